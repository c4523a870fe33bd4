"""Element types, autocast and memory formats."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedtan_hpc import convert_batchnorm, federated_statistics
from tests.batchnorm.layers import (
    TWO_WEIGHTS,
    Values,
    assert_close,
    client_data,
    fill,
    global_moments,
    layer_of_all_clients,
    randn,
    run_layer,
)
from tests.helpers import ranks

ELEMENTS = {
    "bfloat16 in a float32 layer": (torch.bfloat16, torch.float32),
    "float16 in a float32 layer": (torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32": (torch.float32, torch.float32),
}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21}


def rounded_steps() -> dict[str, Values]:
    """A global use of a layer for each pair of element types."""
    rank, found = dist.get_rank(), {}
    for name, (dtype, layer_dtype) in ELEMENTS.items():
        layer = convert_batchnorm(fill(nn.BatchNorm2d(3)).to(layer_dtype))
        x, g = (value.to(dtype) for value in client_data((3, 4, 4), 2)[rank])
        with federated_statistics(layer, TWO_WEIGHTS[rank]):
            values = run_layer(layer, x, g)
        found[name] = values | dict(layer.named_buffers())
    return found


@cache
def rounded_steps_by_rank() -> list[dict[str, Values]]:
    return ranks.on_ranks(2, rounded_steps)


def dtypes(values: Values) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in values.items()}


def expected_buffers(p: list[float], xs: list[Tensor]) -> Values:
    """Running statistics after a new layer's first use."""
    mean, variance = global_moments(p, xs)
    return {"running_mean": 0.1 * mean, "running_var": 0.9 + 0.1 * variance}


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_element_type_is_torchs_and_as_exact_as_its_rounding(name: str) -> None:
    dtype, layer_dtype = ELEMENTS[name]
    rounded = [(x.to(dtype), g.to(dtype)) for x, g in client_data((3, 4, 4), 2)]
    torchs_own = run_layer(fill(nn.BatchNorm2d(3)).to(layer_dtype), *rounded[0])
    data = [(x.double(), g.double()) for x, g in rounded]
    running = expected_buffers(TWO_WEIGHTS, [x for x, _ in data])
    truths = layer_of_all_clients(data, TWO_WEIGHTS)
    for by_name, truth in zip(rounded_steps_by_rank(), truths, strict=True):
        found = by_name[name]
        assert dtypes(found) == dtypes(torchs_own)
        assert_close({n: found[n] for n in truth}, truth, 2 * ROUNDING[dtype])
        assert_close({n: found[n] for n in running}, running, ROUNDING[layer_dtype])


def autocast_step(rank: int, layer: nn.Module) -> tuple[Values, Tensor]:
    """One use on a linear layer's output under autocast to bfloat16; also that output."""
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.copy_(randn(3, 4, seed=51))
        linear.bias.zero_()
    x, g = client_data((4,), 2)[rank]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = linear(x.float())
        values = run_layer(layer, inputs, g[:, :3].bfloat16())
    return values, inputs.detach()


def autocast_on_this_rank() -> tuple[Values, Tensor]:
    rank = dist.get_rank()
    layer = convert_batchnorm(fill(nn.BatchNorm1d(3)))
    with federated_statistics(layer, TWO_WEIGHTS[rank]):
        values, inputs = autocast_step(rank, layer)
    return values | dict(layer.named_buffers()), inputs


def test_autocast_gives_torchs_types_and_the_pooled_problem_of_the_rounded_values() -> None:
    torchs_own, _ = autocast_step(0, fill(nn.BatchNorm1d(3)))
    measured = ranks.on_ranks(2, autocast_on_this_rank)
    xs = [x for _, x in measured]
    assert all(x.dtype == torch.bfloat16 for x in xs)
    gs = [g[:, :3].bfloat16() for _, g in client_data((4,), 2)]
    data = [(x.double(), g.double()) for x, g in zip(xs, gs, strict=True)]
    running = expected_buffers(TWO_WEIGHTS, [x for x, _ in data])
    truths = layer_of_all_clients(data, TWO_WEIGHTS)
    for (found, _), truth in zip(measured, truths, strict=True):
        assert dtypes(found) == dtypes(torchs_own)
        assert_close({name: found[name] for name in truth}, truth, 2.0**-7)
        assert_close({name: found[name] for name in running}, running, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 2), torch.channels_last_3d)],
    ids=["2d", "3d"],
)
def test_output_and_derivative_keep_the_memory_format_of_the_input(
    shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    x, g = (randn(*shape, seed=seed).to(dtype) for seed in (1, 2))
    layer = convert_batchnorm(fill(nn.SyncBatchNorm(3)).to(dtype))
    plain = copy.deepcopy(layer)
    with federated_statistics(layer, weight=1.0), federated_statistics(plain, weight=1.0):
        inputs = [value.contiguous(memory_format=memory_format) for value in (x, g)]
        measured = run_layer(layer, *inputs)
        expected = run_layer(plain, x, g)
    assert measured["y"].stride() == inputs[0].stride()
    assert measured["dx"].stride() == inputs[0].stride()
    assert_close(measured, expected, 1e-14 if dtype == torch.float64 else 2e-2)
