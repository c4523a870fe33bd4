"""The layer that is used against the one written with ordinary differentiable operations."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedtan_hpc import convert_batchnorm, federated_statistics
from fedtan_hpc.batchnorm import reference
from tests.helpers import networks
from tests.helpers.ranks import on_ranks

Values = dict[str, Tensor]

CLIENTS = 3
SHAPES = {"(N, C)": (4,), "(N, C, L)": (4, 6), "(N, C, H, W)": (4, 3, 5)}
AFFINE = {"affine": True, "not affine": False}


def data(shape: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor]:
    """Input and upstream gradient of this client."""
    generator = torch.Generator().manual_seed(rank)
    size = (5, 8, 3)[rank]
    x, g = (torch.randn(size, *shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return (x * (1 + rank) + rank).requires_grad_(), g


def new_layer(affine: bool) -> nn.SyncBatchNorm:
    """With parameters of this client's own, as after the first step of a round."""
    layer = nn.SyncBatchNorm(4, eps=1e-3, affine=affine, dtype=torch.float64)
    own = torch.Generator().manual_seed(dist.get_rank())
    for start, parameter in enumerate(layer.parameters()):
        nn.init._no_grad_uniform_(parameter, start + 0.5, start + 1.5, own)
    return layer


def outcome(x: Tensor, g: Tensor, y: Tensor, parameters: list[nn.Parameter]) -> Values:
    derivatives = torch.autograd.grad(y, [x, *parameters], g)
    names = ["dx", "d gamma", "d beta"][: len(derivatives)]
    return {"y": y.detach(), **dict(zip(names, derivatives, strict=True))}


def by_layer(shape: tuple[int, ...], affine: bool) -> Values:
    rank = dist.get_rank()
    (x, g), layer = data(shape, rank), convert_batchnorm(new_layer(affine))
    with federated_statistics(layer, networks.weights(CLIENTS)[rank]):
        return outcome(x, g, layer(x), list(layer.parameters()))


def by_reference(shape: tuple[int, ...], affine: bool) -> Values:
    rank = dist.get_rank()
    (x, g), layer = data(shape, rank), new_layer(affine)
    p = networks.weights(CLIENTS)[rank]
    y = reference.batch_norm(x, layer.weight, layer.bias, layer.eps, p)
    return outcome(x, g, y, list(layer.parameters()))


def both_on_this_rank() -> dict[str, tuple[Values, Values]]:
    return {
        f"{shape} {affine}": (
            by_layer(SHAPES[shape], AFFINE[affine]),
            by_reference(SHAPES[shape], AFFINE[affine]),
        )
        for shape in SHAPES
        for affine in AFFINE
    }


@cache
def both_by_rank() -> list[dict[str, tuple[Values, Values]]]:
    return on_ranks(CLIENTS, both_on_this_rank)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", AFFINE)
def test_the_layer_is_the_reference_forward_and_backward(shape: str, affine: str) -> None:
    for found in both_by_rank():
        layer, plain = found[f"{shape} {affine}"]
        assert layer.keys() == plain.keys()
        for name, value in plain.items():
            assert (layer[name] - value).norm() < 1e-12 * value.norm(), name


def own_and_mean() -> tuple[Tensor, Tensor, Tensor]:
    """This client's value, the clients' mean, and the derivative of its own loss."""
    rank = dist.get_rank()
    value = torch.tensor([1.0 + rank, -2.0 * rank], dtype=torch.float64, requires_grad=True)
    mean = reference.client_mean(value, networks.weights(CLIENTS)[rank])
    (derivative,) = torch.autograd.grad(mean.square().sum() * (rank + 1), value)
    return value.detach(), mean.detach(), derivative


def test_a_mean_over_clients_is_its_own_adjoint() -> None:
    p = torch.tensor(networks.weights(CLIENTS), dtype=torch.float64)
    values, means, derivatives = map(
        torch.stack, zip(*on_ranks(CLIENTS, own_and_mean), strict=True)
    )
    scales = torch.arange(1, CLIENTS + 1, dtype=torch.float64)[:, None]
    for mean, derivative in zip(means, derivatives, strict=True):
        torch.testing.assert_close(mean, p @ values, rtol=1e-14, atol=0)
        torch.testing.assert_close(derivative, p @ (2 * scales * means), rtol=1e-14, atol=0)
