"""Compiled networks inside and outside of a context."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from fedtan_hpc import convert_batchnorm, federated_statistics
from tests.batchnorm.layers import TWO_WEIGHTS, Values, assert_close, client_data, gradients
from tests.helpers import networks, pooled, ranks

COMPILED = ["1d", "shared"]


def gradients_inside_and_outside(case: str, backend: str | None) -> list[Values]:
    """Gradients outside, inside, outside and inside the context; compiled if there is a backend."""
    rank, clients = dist.get_rank(), dist.get_world_size()
    x, y = networks.batches(case, clients)[rank]
    module = convert_batchnorm(networks.network(case))
    run = module if backend is None else torch.compile(module, backend=backend)
    found = []
    for inside in (False, True, False, True):
        module.zero_grad()
        with federation_if(inside, module, networks.weights(clients)[rank]):
            cross_entropy(run(x), y).backward()
        found.append({name: value.clone() for name, value in gradients(module).items()})
    return found


def federation_if(inside: bool, module: nn.Module, weight: float) -> AbstractContextManager[None]:
    return federated_statistics(module, weight) if inside else nullcontext()


def compiled_and_eager() -> dict[str, tuple[list[Values], list[Values]]]:
    return {
        case: (
            gradients_inside_and_outside(case, "aot_eager"),
            gradients_inside_and_outside(case, None),
        )
        for case in COMPILED
    }


@cache
def compiled_and_eager_by_rank() -> list[dict[str, tuple[list[Values], list[Values]]]]:
    return ranks.on_ranks(2, compiled_and_eager)


@pytest.mark.parametrize("case", COMPILED)
def test_a_compiled_network_enters_and_leaves_the_context_as_an_eager_one(case: str) -> None:
    for by_case in compiled_and_eager_by_rank():
        compiled, eager = by_case[case]
        for measured, expected in zip(compiled, eager, strict=True):
            assert pooled.worst_relative_error(measured, expected) < 1e-12
        outside, inside = compiled[:2]
        assert pooled.worst_relative_error(inside, outside) > 1e-3


def outputs_inside_and_outside(backend: str | None) -> list[Values]:
    """Output outside the context, then output and gradient inside it; little to compile."""
    rank = dist.get_rank()
    torch.manual_seed(1)
    linear = nn.Linear(4, 3, bias=False)
    module = convert_batchnorm(nn.Sequential(linear, nn.BatchNorm1d(3)).double())
    run = module if backend is None else torch.compile(module, backend=backend)
    x, _ = client_data((4,), 2)[rank]
    with torch.no_grad():
        outside = run(x)
    with federated_statistics(module, TWO_WEIGHTS[rank]):
        inside = run(x)
        (gradient,) = torch.autograd.grad(inside.pow(3).sum(), linear.weight)
    return [{"y": outside}, {"y": inside.detach(), "d linear": gradient}]


def inductor_and_eager() -> tuple[list[Values], list[Values]]:
    return outputs_inside_and_outside("inductor"), outputs_inside_and_outside(None)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs g++")
@pytest.mark.slow
def test_the_default_backend_compiles_to_the_same_numbers() -> None:
    for compiled, eager in ranks.on_ranks(2, inductor_and_eager):
        for measured, expected in zip(compiled, eager, strict=True):
            assert_close(measured, expected, 1e-12)
