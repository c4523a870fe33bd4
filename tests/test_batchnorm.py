"""The converted layer: as torch's own outside the context, global over the ranks inside it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import pooled
import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import RankFailed, on_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from fedtan_hpc import FedTANBatchNorm, convert_batchnorm, federated_statistics
from fedtan_hpc.comm import training_traffic

Values = dict[str, Tensor]

SHAPES: dict[type[_BatchNorm], tuple[int, ...]] = {
    nn.BatchNorm1d: (6, 4, 5),
    nn.BatchNorm2d: (5, 4, 3, 3),
    nn.BatchNorm3d: (4, 4, 2, 3, 2),
    nn.SyncBatchNorm: (5, 4, 3, 3),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "eps and momentum": {"eps": 1e-3, "momentum": 0.3},
    "momentum None": {"momentum": None},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "meta device": {"device": "meta"},
}
SETTINGS = ["training", "eps", "momentum", "affine", "track_running_stats", "num_features"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fill(layer: _BatchNorm) -> _BatchNorm:
    """Parameters that are neither 0 nor 1."""
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(randn(layer.num_features, seed=7).abs() + 0.5)
            layer.bias.copy_(randn(layer.num_features, seed=8))
    return layer


def run_layer(layer: nn.Module, x: Tensor, g: Tensor) -> Values:
    """Output, derivatives for the loss sum(y g), and buffers after one use of ``layer``."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    (y * g).sum().backward()
    values = {"y": y.detach(), "dx": x.grad, **gradients(layer), **dict(layer.named_buffers())}
    return {name: value.clone() for name, value in values.items() if value is not None}


def gradients(module: nn.Module) -> Values:
    return {f"d {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}


def assert_same_bits(measured: Values, expected: Values) -> None:
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert measured[name].dtype == value.dtype, name
        assert torch.equal(measured[name], value), name


def assert_close(measured: Values, expected: Values, bound: float) -> None:
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        error = (measured[name].double() - value.double()).norm()
        assert error <= bound * value.double().norm(), (name, float(error))


# Conversion


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_conversion_keeps_parameters_buffers_and_settings(
    kind: type[_BatchNorm], options: str, training: bool
) -> None:
    layer = kind(4, **OPTIONS[options]).train(training)
    expected = dict(layer.named_parameters()) | dict(layer.named_buffers())
    keys = list(layer.state_dict())
    converted = convert_batchnorm(nn.Sequential(layer))[0]  # type: ignore[index]
    assert type(converted) is FedTANBatchNorm
    found = dict(converted.named_parameters()) | dict(converted.named_buffers())
    assert found.keys() == expected.keys()
    assert all(found[name] is value for name, value in expected.items())
    assert list(converted.state_dict()) == keys
    assert all(getattr(converted, name) == getattr(layer, name) for name in SETTINGS)


def test_a_converted_layer_has_the_dtype_and_device_asked_for() -> None:
    assert convert_batchnorm(nn.BatchNorm1d(3, dtype=torch.bfloat16)).weight.dtype == torch.bfloat16
    assert convert_batchnorm(nn.BatchNorm1d(3, device="meta")).running_mean.device.type == "meta"  # type: ignore[union-attr]


def test_a_module_keeps_its_state_dict_keys_and_parameter_order() -> None:
    module = networks.network("2d")
    names, parameters = list(module.state_dict()), list(module.parameters())
    assert convert_batchnorm(module) is module
    assert list(module.state_dict()) == names
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))


def test_a_layer_in_two_places_stays_one_layer() -> None:
    layer = nn.BatchNorm1d(3)
    module = convert_batchnorm(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}))
    assert isinstance(module, nn.ModuleDict)
    assert isinstance(module["a"], FedTANBatchNorm)
    assert module["a"] is module["b"][0]


def test_a_root_that_is_a_layer_comes_back_converted() -> None:
    layer = nn.BatchNorm2d(3)
    converted = convert_batchnorm(layer)
    assert type(converted) is FedTANBatchNorm
    assert converted.weight is layer.weight


def test_an_absent_child_is_left_absent() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3))
    module.register_module("nothing", None)
    assert convert_batchnorm(module)._modules["nothing"] is None


def test_hooks_survive_the_conversion() -> None:
    layer, calls = nn.BatchNorm1d(3), list[str]()
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    removable = layer.register_forward_hook(lambda *_: calls.append("removed"))
    module = convert_batchnorm(nn.Sequential(nn.Linear(2, 3), layer))
    removable.remove()
    module(torch.randn(4, 2)).sum().backward()
    assert calls == ["pre", "forward", "backward"]


def test_converting_twice_is_converting_once() -> None:
    module = convert_batchnorm(networks.network("shared"))
    before = list(module.modules())
    after = list(convert_batchnorm(module).modules())
    assert all(a is b for a, b in zip(after, before, strict=True))


class OwnBatchNorm(nn.BatchNorm1d):
    """A subclass, which might do anything."""


@pytest.mark.parametrize("layer", [nn.LazyBatchNorm1d(), nn.LazyBatchNorm2d(), OwnBatchNorm(3)])
def test_other_kinds_of_layer_are_refused_by_name(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Sequential(layer))
    with pytest.raises(ValueError, match=rf"layer 1\.0 is a {type(layer).__name__}"):
        convert_batchnorm(module)
    with pytest.raises(ValueError, match=r"layer \(root\)"):
        convert_batchnorm(layer)


def two_uses(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> list[Values]:
    """A use in training and one in evaluation mode."""
    found = []
    for training in (True, False):
        layer.train(training)
        x, g = (randn(*shape, seed=training + seed).to(dtype) for seed in (1, 5))
        found.append(run_layer(layer, x, g))
        layer.zero_grad()
    return found


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "meta device"])
@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind is not nn.SyncBatchNorm])
def test_outside_the_context_the_layer_is_torchs_to_the_bit(
    kind: type[_BatchNorm], options: str
) -> None:
    original = fill(kind(4, **OPTIONS[options]))
    converted = convert_batchnorm(copy.deepcopy(original))
    dtype = OPTIONS[options].get("dtype", torch.float32)
    expected = two_uses(original, SHAPES[kind], dtype)
    for measured, value in zip(two_uses(converted, SHAPES[kind], dtype), expected, strict=True):
        assert_same_bits(measured, value)


@pytest.mark.parametrize("options", ["defaults", "no running statistics"])
def test_in_evaluation_mode_the_context_changes_no_bit(options: str) -> None:
    original = fill(nn.BatchNorm1d(4, **OPTIONS[options])).eval()
    converted = convert_batchnorm(copy.deepcopy(original))
    x, g = randn(6, 4).float(), randn(6, 4, seed=1).float()
    with federated_statistics(converted, weight=1.0):
        measured = run_layer(converted, x, g)
    assert_same_bits(measured, run_layer(original, x, g))


def test_an_input_of_another_width_is_refused() -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(4))
    with federated_statistics(layer, weight=1.0), pytest.raises(ValueError, match=r"\(N, 4\)"):
        layer(torch.randn(6, 3))


# One client


def network_gradients(module: nn.Module, case: str) -> Values:
    x, y = networks.batches(case, 1)[0]
    cross_entropy(module(x), y).backward()
    return gradients(module)


@pytest.mark.parametrize("case", networks.CASES)
def test_one_client_alone_is_local_batchnorm(case: str) -> None:
    expected = network_gradients(networks.network(case), case)
    module = convert_batchnorm(networks.network(case))
    with federated_statistics(module, weight=1.0):
        measured = network_gradients(module, case)
    assert pooled.worst_relative_error(measured, expected) < 1e-12


@pytest.mark.parametrize("weight", [0.5, 0.0, -1.0, 2.0, float("nan")])
def test_one_client_alone_has_weight_1(weight: float) -> None:
    module = convert_batchnorm(networks.network("shared"))
    with federated_statistics(module, weight), pytest.raises(ValueError, match="layer bn"):
        module(networks.batches("shared", 1)[0][0])


def test_an_unconverted_layer_is_refused_by_name() -> None:
    module = nn.Sequential(convert_batchnorm(nn.BatchNorm1d(3)), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="layer 1 is local"), federated_statistics(module, 1.0):
        pass
    assert is_local(module[0])


def is_local(layer: nn.Module) -> bool:
    """Whether ``layer`` agrees with torch's BN; in a context of weight 0.5 it would raise."""
    x = randn(6, 3).float()
    return torch.equal(layer(x), nn.BatchNorm1d(3)(x))


def test_after_the_context_the_layer_is_local_again() -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    with federated_statistics(layer, weight=0.5):
        assert raises_value_error(layer)
    assert is_local(layer)


def test_after_an_exception_the_layer_is_local_again() -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    with pytest.raises(KeyError), federated_statistics(layer, weight=0.5):
        raise KeyError
    assert is_local(layer)


def raises_value_error(layer: nn.Module) -> bool:
    try:
        layer(torch.randn(6, 3))
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("fails", [False, True])
def test_an_inner_context_gives_the_outer_one_back(fails: bool) -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    with federated_statistics(layer, weight=0.5):
        try:
            with federated_statistics(layer, weight=1.0):
                layer(torch.randn(6, 3))
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert raises_value_error(layer)
    assert is_local(layer)


def test_the_backward_pass_may_follow_the_context() -> None:
    expected = network_gradients(networks.network("1d"), "1d")
    module = convert_batchnorm(networks.network("1d"))
    x, y = networks.batches("1d", 1)[0]
    with federated_statistics(module, weight=1.0):
        loss = cross_entropy(module(x), y)
    loss.backward()
    assert pooled.worst_relative_error(gradients(module), expected) < 1e-12


class NoGradient(torch.autograd.Function):
    """The identity, through which nothing flows back, not even zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:  # type: ignore[override]
        return None


def test_an_undefined_gradient_counts_as_zero() -> None:
    x = randn(6, 3).requires_grad_()
    layer = convert_batchnorm(nn.BatchNorm1d(3).double())
    with federated_statistics(layer, weight=1.0):
        NoGradient.apply(layer(x)).sum().backward()
    assert x.grad is None or x.grad.count_nonzero() == 0


# Several clients: one layer against pooled autograd


GLOBAL_SHAPES = {"(N, C)": (3,), "(N, C, L)": (3, 7), "(N, C, H, W)": (3, 4, 5)}


def client_data(
    shape: tuple[int, ...], clients: int, sizes: tuple[int, ...] = (5, 8, 2, 6)
) -> list[tuple[Tensor, Tensor]]:
    """Inputs and upstream gradients, of another size, mean and spread on each client."""
    return [
        (
            randn(sizes[k], *shape, seed=10 + k) * (1 + 0.4 * k) + k,
            randn(sizes[k], *shape, seed=20 + k),
        )
        for k in range(clients)
    ]


def layer_on_this_rank(shape: tuple[int, ...], p: list[float]) -> Values:
    """One global use of a layer on this rank's data."""
    rank = dist.get_rank()
    layer = convert_batchnorm(fill(nn.BatchNorm1d(shape[0])).double())
    x, g = client_data(shape, len(p))[rank]
    with federated_statistics(layer, p[rank]):
        return run_layer(layer, x, g)


def layer_of_all_clients(data: list[tuple[Tensor, Tensor]], p: list[float]) -> list[Values]:
    """What each client should find, from one pooled problem sum_k p_k F_k in float64."""
    sizes = [len(x) for x, _ in data]
    original = fill(nn.BatchNorm1d(data[0][0].size(1))).double()
    layer = pooled.PooledBatchNorm(original, sizes, p)
    xs = [x.clone().requires_grad_() for x, _ in data]
    ys = layer(torch.cat(xs)).split(sizes)
    losses = [(y * g).sum() for y, (_, g) in zip(ys, data, strict=True)]
    total = torch.stack([w * loss for w, loss in zip(p, losses, strict=True)]).sum()
    dxs = torch.autograd.grad(total, xs, retain_graph=True)
    found = []
    for y, w, dx, loss in zip(ys, p, dxs, losses, strict=True):
        gamma, beta = torch.autograd.grad(loss, [original.weight, original.bias], retain_graph=True)
        found.append({"y": y.detach(), "dx": dx / w, "d weight": gamma, "d bias": beta})
    return found


@pytest.mark.parametrize("shape", GLOBAL_SHAPES)
@pytest.mark.parametrize("clients", [2, 3])
def test_output_and_all_derivatives_are_those_of_the_pooled_problem(
    shape: str, clients: int
) -> None:
    p = networks.weights(clients)
    expected = layer_of_all_clients(client_data(GLOBAL_SHAPES[shape], clients), p)
    measured = on_ranks(clients, layer_on_this_rank, GLOBAL_SHAPES[shape], p)
    for found, truth in zip(measured, expected, strict=True):
        assert_close({name: found[name] for name in truth}, truth, 1e-10)


# Weights and batches


BAD_WEIGHTS = [
    [-0.5, 1.5],
    [float("nan"), 1.0],
    [1.0, float("inf")],
    [0.5, 0.6],
    [0.0, 0.0],
    [1e300, 0.5],
    [0.4, -0.2, 0.8],
    [0.3, 0.3, float("nan")],
    [0.3, 0.3, 0.3],
]


def message_of_error(p: list[float], sizes: list[int]) -> str | None:
    """What the ValueError says on this rank; None if there is none."""
    rank = dist.get_rank()
    module = convert_batchnorm(networks.network("shared"))
    with federated_statistics(module, p[rank]):
        try:
            module(randn(sizes[rank], 6))
        except ValueError as error:
            return str(error)
    return None


@pytest.mark.parametrize("p", BAD_WEIGHTS, ids=str)
def test_bad_weights_raise_on_every_rank_and_name_the_layer(p: list[float]) -> None:
    for message in on_ranks(len(p), message_of_error, p, [5, 8, 3][: len(p)]):
        assert message is not None
        assert message.startswith("layer bn: ")
        assert "weights" in message


def test_an_empty_batch_with_weight_raises_on_every_rank() -> None:
    for message in on_ranks(3, message_of_error, [0.3, 0.3, 0.4], [5, 0, 4]):
        assert message == "layer bn: 1 of 3 batches are empty, with a weight above 0"


def test_one_value_among_all_that_count_raises_on_every_rank() -> None:
    for message in on_ranks(2, message_of_error, [1.0, 0.0], [1, 6]):
        assert message is not None
        assert message.startswith("layer bn: one value per channel")


WEIGHTLESS = {
    "NaN": torch.full((4, 6), torch.nan, dtype=torch.float64),
    "infinite": torch.full((4, 6), torch.inf, dtype=torch.float64),
    "empty": torch.zeros(0, 6, dtype=torch.float64),
    "one sample": randn(1, 6, seed=3),
}


def two_steps(p: list[float], xs: list[Tensor]) -> Values:
    """Output, gradients and buffers on this rank after two forward and one backward pass."""
    rank = dist.get_rank()
    module = convert_batchnorm(networks.network("1d"))
    with federated_statistics(module, p[rank]):
        module(xs[rank])
        y = module(xs[rank])
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), **gradients(module), **dict(module.named_buffers())}


@pytest.mark.parametrize("batch", WEIGHTLESS)
def test_a_rank_without_weight_changes_nothing_for_the_others(batch: str) -> None:
    first, second = randn(5, 6, seed=1), randn(7, 6, seed=2) + 1
    expected = on_ranks(2, two_steps, [0.4, 0.6], [first, second])
    xs = [first, WEIGHTLESS[batch], second]
    measured = on_ranks(3, two_steps, [0.4, 0.0, 0.6], xs)
    assert_close(measured[0], expected[0], 1e-12)
    assert_close(measured[2], expected[1], 1e-12)
    buffers = [name for name in measured[0] if "running" in name]
    for name in buffers:
        assert torch.equal(measured[1][name], measured[0][name])


# Running statistics


def buffers_after(momentum: float | None, p: list[float], calls: list[list[Tensor]]) -> Values:
    """This rank's buffers after global uses with ``calls[step][rank]``."""
    rank = dist.get_rank()
    layer = convert_batchnorm(nn.BatchNorm1d(3, momentum=momentum).double())
    with torch.no_grad():
        layer.running_mean.copy_(randn(3, seed=31))  # type: ignore[operator, union-attr]
        layer.running_var.copy_(randn(3, seed=32).abs() + 1)  # type: ignore[operator, union-attr]
    with federated_statistics(layer, p[rank]):
        for xs in calls:
            layer(xs[rank])
    return {name: value.clone() for name, value in layer.named_buffers()}


def global_moments(p: list[float], xs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, by two passes over the clients that count."""
    dims = [dim for dim in range(xs[0].dim()) if dim != 1]
    terms = [(w, x) for w, x in zip(p, xs, strict=True) if w]
    mean = torch.stack([w * x.mean(dims, keepdim=True) for w, x in terms]).sum(0)
    variance = torch.stack([w * (x - mean).square().mean(dims) for w, x in terms]).sum(0)
    n = sum(x.numel() // x.size(1) for _, x in terms)
    return mean.flatten(), variance * n / (n - 1)


def assert_equal_bits_on_all_ranks(measured: list[Values]) -> None:
    for other in measured[1:]:
        assert_same_bits(other, measured[0])


@pytest.mark.parametrize("p", [[0.5, 0.5, 0.0], [0.2, 0.5, 0.3]], ids=str)
@pytest.mark.parametrize("shape", GLOBAL_SHAPES)
def test_running_statistics_move_towards_the_global_ones(shape: str, p: list[float]) -> None:
    xs = [x for x, _ in client_data(GLOBAL_SHAPES[shape], 3)]
    measured = on_ranks(3, buffers_after, 0.1, p, [xs])
    assert_equal_bits_on_all_ranks(measured)
    mean, variance = global_moments(p, xs)
    expected = {
        "running_mean": 0.9 * randn(3, seed=31) + 0.1 * mean,
        "running_var": 0.9 * (randn(3, seed=32).abs() + 1) + 0.1 * variance,
        "num_batches_tracked": torch.tensor(1),
    }
    assert_close(measured[0], expected, 1e-14)


def test_without_momentum_running_statistics_are_means_over_the_calls() -> None:
    p = [0.25, 0.75]
    calls = [[randn(n, 3, seed=40 + s + n) + s for n in (4, 6)] for s in range(3)]
    measured = on_ranks(2, buffers_after, None, p, calls)
    assert_equal_bits_on_all_ranks(measured)
    means, variances = zip(*[global_moments(p, xs) for xs in calls], strict=True)
    expected = {
        "running_mean": torch.stack(means).mean(0),
        "running_var": torch.stack(variances).mean(0),
        "num_batches_tracked": torch.tensor(3),
    }
    assert_close(measured[0], expected, 1e-14)


# Messages


def traffic_of_one_step(case: str) -> list[tuple[int, int]]:
    """Messages and bytes of the forward and of the backward pass."""
    rank, clients = dist.get_rank(), dist.get_world_size()
    x, y = networks.batches(case, clients)[rank]
    module = convert_batchnorm(networks.network(case))
    found = []
    with federated_statistics(module, networks.weights(clients)[rank]):
        before = training_traffic.copy()
        loss = cross_entropy(module(x), y)
        found.append(training_traffic.since(before))
        before = training_traffic.copy()
        loss.backward()
        found.append(training_traffic.since(before))
    cross_entropy(module(x), y).backward()
    assert training_traffic.since(before) == found[1]
    return [(traffic.messages, traffic.bytes) for traffic in found]


@pytest.mark.parametrize(
    ("case", "widths"),
    [
        ("1d", [5, 4]),
        ("shared", [5, 5]),
        ("branches", [4, 4]),
        ("3d", [4, 5]),
        ("not affine", [5, 4]),
        ("no running statistics", [5, 4]),
    ],
)
@pytest.mark.parametrize("clients", [2, 3])
def test_each_use_of_a_layer_costs_one_message_forward_and_one_backward(
    case: str, widths: list[int], clients: int
) -> None:
    forward = len(widths), sum(8 * (7 + 4 * width) for width in widths)
    backward = len(widths), sum(8 * (2 + 2 * width) for width in widths)
    for measured in on_ranks(clients, traffic_of_one_step, case):
        assert measured == [forward, backward]


def step_in_a_group_of_two(data: list[tuple[Tensor, Tensor]]) -> Values:
    """Ranks 0 and 2 normalise together, ranks 1 and 3 too; ranks take ``data`` in rank order."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    layer = convert_batchnorm(fill(nn.BatchNorm1d(3)).double())
    with federated_statistics(layer, (0.25, 0.75)[rank // 2], group=groups[rank % 2]):
        return run_layer(layer, *data[rank])


def test_groups_of_ranks_are_independent() -> None:
    data = client_data((3,), 4)
    measured = on_ranks(4, step_in_a_group_of_two, data)
    for first in (0, 1):
        pair = [first, first + 2]
        expected = layer_of_all_clients([data[k] for k in pair], [0.25, 0.75])
        for k, truth in zip(pair, expected, strict=True):
            assert_close({name: measured[k][name] for name in truth}, truth, 1e-12)


# Element types and memory formats


HALVES = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21}


def rounded_step(dtype: torch.dtype, layer_dtype: torch.dtype) -> Values:
    """A global use of a layer on inputs of ``dtype``."""
    rank = dist.get_rank()
    layer = convert_batchnorm(fill(nn.BatchNorm2d(3)).to(layer_dtype))
    x, g = (value.to(dtype) for value in client_data((3, 4, 4), 2)[rank])
    with federated_statistics(layer, (0.25, 0.75)[rank]):
        return run_layer(layer, x, g)


@pytest.mark.parametrize(
    ("dtype", "layer_dtype"),
    [
        *[(half, torch.float32) for half in HALVES],
        *[(half, half) for half in HALVES],
        (torch.float32, torch.float32),
    ],
    ids=str,
)
def test_every_element_type_is_as_exact_as_its_rounding(
    dtype: torch.dtype, layer_dtype: torch.dtype
) -> None:
    data = [(x.to(dtype).double(), g.to(dtype).double()) for x, g in client_data((3, 4, 4), 2)]
    p = [0.25, 0.75]
    mean, variance = global_moments(p, [x for x, _ in data])
    running = {"running_mean": 0.1 * mean, "running_var": 0.9 + 0.1 * variance}
    torchs_own = run_layer(
        fill(nn.BatchNorm2d(3)).to(layer_dtype), *(value.to(dtype) for value in data[0])
    )
    measured = on_ranks(2, rounded_step, dtype, layer_dtype)
    for found, truth in zip(measured, layer_of_all_clients(data, p), strict=True):
        assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in torchs_own.items()}
        assert_close({name: found[name] for name in truth}, truth, 2 * ROUNDING[dtype])
        assert_close({name: found[name] for name in running}, running, ROUNDING[layer_dtype])


def autocast_step(x: Tensor, layer: nn.Module) -> tuple[Values, Tensor]:
    """The layer after a linear one under autocast to bfloat16; also the layer's input."""
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.copy_(randn(3, 4, seed=51))
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(linear(x))
    y.float().square().sum().backward()
    values = {"y": y.detach(), "d linear": linear.weight.grad, **dict(layer.named_buffers())}
    return {name: value for name, value in values.items() if value is not None}, seen[0]


def autocast_on_this_rank() -> tuple[Values, Tensor]:
    rank = dist.get_rank()
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    with federated_statistics(layer, (0.25, 0.75)[rank]):
        return autocast_step(client_data((4,), 2)[rank][0].float(), layer)


def test_autocast_gives_torchs_types_and_statistics_of_the_rounded_values() -> None:
    torchs_own, _ = autocast_step(client_data((4,), 2)[0][0].float(), nn.BatchNorm1d(3))
    measured = on_ranks(2, autocast_on_this_rank)
    inputs = [x for _, x in measured]
    assert all(x.dtype == torch.bfloat16 for x in inputs)
    mean, variance = global_moments([0.25, 0.75], [x.double() for x in inputs])
    running = {"running_mean": 0.1 * mean, "running_var": 0.9 + 0.1 * variance}
    for found, _ in measured:
        assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in torchs_own.items()}
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
    layer = convert_batchnorm(fill(nn.BatchNorm2d(3)).to(dtype))
    plain = copy.deepcopy(layer)
    with federated_statistics(layer, weight=1.0), federated_statistics(plain, weight=1.0):
        inputs = [value.contiguous(memory_format=memory_format) for value in (x, g)]
        measured = run_layer(layer, *inputs)
        expected = run_layer(plain, x, g)
    assert measured["y"].stride() == inputs[0].stride()
    assert measured["dx"].stride() == inputs[0].stride()
    assert_close(measured, expected, 1e-14 if dtype == torch.float64 else 2e-2)


# Compiled networks


def gradients_inside_and_outside(case: str, backend: str | None) -> list[Values]:
    """Gradients outside, inside, outside and inside the context; compiled if there is a backend."""
    rank, clients = dist.get_rank(), dist.get_world_size()
    p = networks.weights(clients)[rank]
    x, y = networks.batches(case, clients)[rank]
    module = convert_batchnorm(networks.network(case))
    run: Callable[[Tensor], Tensor] = module
    if backend is not None:
        run = torch.compile(module, backend=backend)  # type: ignore[assignment]
    found = []
    for inside in (False, True, False, True):
        module.zero_grad()
        if inside:
            with federated_statistics(module, p):
                cross_entropy(run(x), y).backward()
        else:
            cross_entropy(run(x), y).backward()
        found.append({name: value.clone() for name, value in gradients(module).items()})
    return found


def compiled_and_eager(case: str, backend: str) -> tuple[list[Values], list[Values]]:
    compiled = gradients_inside_and_outside(case, backend)
    return compiled, gradients_inside_and_outside(case, None)


COMPILED = [
    ("1d", "aot_eager"),
    ("shared", "aot_eager"),
    ("2d", "aot_eager"),
    pytest.param(
        "1d",
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++"),
    ),
]


@pytest.mark.parametrize(("case", "backend"), COMPILED)
def test_a_compiled_network_enters_and_leaves_the_context_as_an_eager_one(
    case: str, backend: str
) -> None:
    for compiled, eager in on_ranks(2, compiled_and_eager, case, backend):
        for measured, expected in zip(compiled, eager, strict=True):
            assert pooled.worst_relative_error(measured, expected) < 1e-12
        outside, inside = compiled[:2]
        assert pooled.worst_relative_error(inside, outside) > 1e-3


# Ranks at different layers


class TwoBranches(nn.Module):
    """Branches of given widths, run in a given order."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right = nn.BatchNorm1d(left), nn.BatchNorm1d(right)

    def forward(self, x: Tensor, order: list[str]) -> dict[str, Tensor]:
        layers = {"left": self.left, "right": self.right}
        return {name: layers[name](x[:, : layers[name].num_features]) for name in order}


def order_of(rank: int) -> list[str]:
    return ["left", "right"] if rank == 0 else ["right", "left"]


def error_of_forward_mix_up() -> str:
    module = convert_batchnorm(TwoBranches(4, 4).double())
    rank, clients = dist.get_rank(), dist.get_world_size()
    with federated_statistics(module, 1 / clients):
        try:
            module(randn(5, 4), order_of(rank))
        except RuntimeError as error:
            return str(error)
    return "no error"


def error_of_backward_mix_up() -> str:
    module = convert_batchnorm(TwoBranches(4, 4).double())
    rank, clients = dist.get_rank(), dist.get_world_size()
    x = randn(5, 4).requires_grad_()
    with federated_statistics(module, 1 / clients):
        y = module(x, ["left", "right"])
        try:
            for name in order_of(rank):
                torch.autograd.grad(y[name].square().sum(), x)
        except RuntimeError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("clients", [2, 3])
@pytest.mark.parametrize("mix_up", [error_of_forward_mix_up, error_of_backward_mix_up])
def test_branches_of_one_width_in_different_orders_raise_on_every_rank(
    mix_up: Callable[[], str], clients: int
) -> None:
    messages = on_ranks(clients, mix_up)
    for rank, message in enumerate(messages):
        assert message.startswith(f"layer {order_of(rank)[0]}: another rank sent")


def forward_mix_up_of_widths(left: int, right: int) -> float:
    module = convert_batchnorm(TwoBranches(left, right).double())
    with federated_statistics(module, 1 / dist.get_world_size()):
        y = module(randn(5, max(left, right)), order_of(dist.get_rank()))
    return float(y["left"].sum() + y["right"].sum())


@pytest.mark.parametrize("widths", [(3, 9), (9, 3)], ids=str)
@pytest.mark.parametrize("clients", [2, 3])
def test_branches_of_other_widths_in_different_orders_end_every_rank(
    widths: tuple[int, int], clients: int, tmp_path: Path
) -> None:
    started = [
        ranks._start(rank, clients, tmp_path / "rendezvous", forward_mix_up_of_widths, widths)
        for rank in range(clients)
    ]
    try:
        for rank, (_, answer) in enumerate(started):
            assert answer.poll(20), f"rank {rank} hangs"
            with pytest.raises(RankFailed):
                ranks._answer(answer, rank)
    finally:
        for process, _ in started:
            process.kill()
            process.join()
