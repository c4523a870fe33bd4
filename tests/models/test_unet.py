"""The U-Net: sizes, what a pixel sees, stacked copies, and the gradient of the pooled problem."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedtan_hpc
from fedtan_hpc.config.schema import ModelConfig
from fedtan_hpc.models import factory
from fedtan_hpc.models.unet import UNet
from tests.helpers import networks, pooled
from tests.helpers.ranks import on_ranks

CLASSES = 3


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 8, 8), (2, 4, 5), (3, 23, 17)])
def test_every_pixel_gets_scores(shape: tuple[int, ...]) -> None:
    module = factory.build(ModelConfig(name="unet"), shape, CLASSES, seed=0)
    assert module(torch.zeros(2, *shape)).shape == (2, CLASSES, *shape[1:])


def test_parameters_are_those_of_four_levels() -> None:
    convolutions = (3 * 16 + 16 * 16) + (16 * 32 + 32 * 32) + (32 * 64 + 64 * 64)
    convolutions += (64 * 128 + 128 * 128) + (192 * 64 + 64 * 64)
    convolutions += (96 * 32 + 32 * 32) + (48 * 16 + 16 * 16)
    norms = 2 * 2 * (16 + 32 + 64 + 128 + 64 + 32 + 16)
    head = 16 * CLASSES + CLASSES
    assert factory.parameter_count(UNet(3, CLASSES)) == 9 * convolutions + norms + head


def test_scores_depend_on_the_pixel_itself_and_on_far_ones() -> None:
    """The one by the first skip, the others by the way down and up."""
    module = factory.build(ModelConfig(name="unet"), (1, 32, 32), CLASSES, seed=0).eval()
    x = torch.randn(1, 1, 32, 32, requires_grad=True)
    module(x)[0, 0, 5, 5].backward()
    assert x.grad is not None
    assert x.grad[0, 0, 5, 5] != 0
    assert x.grad[0, 0, 5, 25] != 0
    for level in module.get_submodule("up").children():  # what comes from below is left out
        weight = level.get_parameter("0.weight").detach()
        weight[:, : -len(weight)] = 0
    x.grad = None
    module(x)[0, 0, 5, 5].backward()
    assert x.grad is not None
    assert x.grad[0, 0, 5, 5] != 0
    assert x.grad[0, 0, 5, 25] == 0


def test_copies_run_stacked_as_one_by_one() -> None:
    copies = [fedtan_hpc.convert_batchnorm(small(seed)) for seed in (1, 2)]
    x = torch.randn(2, 4, 2, 9, 6, dtype=torch.float64)
    parameters, buffers = torch.func.stack_module_state(copies)

    def scores(values: dict[str, Tensor], kept: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(copies[0], (values, kept), (images,))  # type: ignore[no-any-return]

    for module in copies:
        module.eval()
    stacked = torch.func.vmap(scores)(parameters, buffers, x)
    alone = torch.stack([module(images) for module, images in zip(copies, x, strict=True)])
    torch.testing.assert_close(stacked, alone)


def small(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return UNet(2, CLASSES, widths=(4, 6, 8, 10)).double()


def batch(client: int) -> tuple[Tensor, Tensor]:
    """Images and masks; sizes, means and spreads of the clients differ."""
    generator = torch.Generator().manual_seed(client)
    count, size = (3, 5)[client], (13, 10)
    x = torch.randn(count, 2, *size, dtype=torch.float64, generator=generator)
    mask = torch.randint(0, CLASSES, (count, *size), generator=generator)
    return x * (1 + client) + client, mask


def client_gradients() -> dict[str, Tensor]:
    """sum_k p_k g_k on this rank, which is client k."""
    rank = dist.get_rank()
    p = networks.weights(2)[rank]
    module = fedtan_hpc.convert_batchnorm(small())
    x, mask = batch(rank)
    with fedtan_hpc.federated_statistics(module, weight=p):
        cross_entropy(module(x), mask).backward()
    return pooled.summed_over_ranks(module, p)


def test_mean_of_client_gradients_is_the_pooled_gradient() -> None:
    clients = [batch(client) for client in range(2)]
    expected = pooled.pooled_gradient(small(), clients, networks.weights(2))
    for measured in on_ranks(2, client_gradients):
        assert pooled.worst_relative_error(measured, expected) < 1e-10
