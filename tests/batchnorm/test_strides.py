"""Gradients and inputs in any memory order, against plain operations on contiguous values."""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from fedtan_hpc import convert_batchnorm, federated_backward, federated_statistics
from fedtan_hpc.batchnorm.context import normalised_by
from fedtan_hpc.batchnorm.conversion import batchnorm_layers
from fedtan_hpc.batchnorm.local_statistics import LocalStatistics, RunningStatistics
from fedtan_hpc.batchnorm.statistics_call import GlobalStatistics
from tests.batchnorm.layers import randn

LAYERS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
Order = list[int]


def in_memory_order(values: Tensor, order: Order) -> Tensor:
    """The same values, dimension ``order[0]`` the slowest in memory."""
    return values.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])


def cases(samples: int, dims: int) -> list[tuple[Tensor, Tensor, Order, Order]]:
    """Inputs and upstream gradients with memory orders; sizes of 1 make orders ambiguous."""
    choices = random.Random(100 * samples + dims)
    found: list[tuple[Tensor, Tensor, Order, Order]] = []
    while len(found) < 30:
        shape = [samples, choices.choice((2, 5)), *choices.choices((1, 2, 3), k=dims - 2)]
        if samples * torch.Size(shape[2:]).numel() > 1:
            of_x, of_g = (choices.sample(range(dims), dims) for _ in range(2))
            x, g = (randn(*shape, seed=len(found) + seed) for seed in (0, 50))
            found.append((x * 2 + 1, g, of_x, of_g))
    return found


def by_plain_operations(layer: _BatchNorm, x: Tensor, g: Tensor) -> list[Tensor]:
    """The derivatives of sum(y g) by x, gamma and beta."""
    x = x.clone().requires_grad_()
    others, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    deviation = x - x.mean(others, keepdim=True)
    xhat = deviation / (deviation.square().mean(others, keepdim=True) + layer.eps).sqrt()
    y = xhat * layer.weight.view(shape) + layer.bias.view(shape)
    return list(torch.autograd.grad((y * g).sum(), [x, layer.weight, layer.bias]))


def layer_for(x: Tensor) -> _BatchNorm:
    layer = LAYERS[x.dim()](x.size(1)).double()
    with torch.no_grad():
        layer.weight.copy_(randn(x.size(1), seed=7).abs() + 0.5)
    convert_batchnorm(layer)
    return layer


def by_the_layer(layer: _BatchNorm, x: Tensor, g: Tensor, order: Order) -> Sequence[Tensor | None]:
    x = x.detach().requires_grad_()
    layer(x).backward(in_memory_order(g, order))
    return [value.grad for value in (x, layer.weight, layer.bias)]


def weighted_sum(layer: _BatchNorm, x: Tensor, g: Tensor, order: Order) -> Tensor:
    """The loss sum(y g), whose gradient by y lies in memory like ``order``."""
    y, weights = (value.permute(order).reshape(-1) for value in (layer(x), g))
    return (y * weights).sum()


@pytest.mark.parametrize("path", ["local", "synchronised", "lock-step"])
@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_a_gradient_in_any_memory_order_gives_the_same(path: str, dims: int, samples: int) -> None:
    for x, g, of_x, of_g in cases(samples, dims):
        layer = layer_for(x)
        expected = by_plain_operations(layer, x, g)
        x = in_memory_order(x, of_x)
        found: Sequence[Tensor | None]
        if path == "lock-step":
            x.requires_grad_()
            federated_backward([layer], [partial(weighted_sum, layer, x, g, of_g)], [1.0])
            found = [x.grad, layer.weight.grad, layer.bias.grad]
        else:
            with federated_statistics(layer, 1.0) if path == "synchronised" else nullcontext():
                found = by_the_layer(layer, x, g, of_g)
        for value, right in zip(found, expected, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_stacked_clients_give_the_same(is_global: bool, dims: int, samples: int) -> None:
    for x, g, of_x, of_g in cases(samples, dims):
        layer = layer_for(x)
        expected = by_plain_operations(layer, x, g)
        values = {name: value.expand(2, *value.shape) for name, value in layer.named_parameters()}

        def loss(values: dict[str, Tensor], x: Tensor, layer: _BatchNorm, g: Tensor) -> Tensor:
            y: Tensor = functional_call(layer, values, (x,))
            return (y * g).sum()

        running = [RunningStatistics(batchnorm_layers(layer)["(root)"], 2)]
        context = LocalStatistics(running, slice(None), None, (samples, samples))
        if is_global:
            context = GlobalStatistics(  # type: ignore[assignment]
                [0.5, 0.5], None, ["(root)"], sizes=(samples,) * 2, is_stacked=True
            )
        with normalised_by(layer, context):
            x, g = in_memory_order(x, of_x), in_memory_order(g, of_g)
            both = torch.stack([x, x])
            by_values, by_x = vmap(grad(loss, (0, 1)), (0, 0, None, None))(values, both, layer, g)
        found = [by_x, by_values["weight"], by_values["bias"]]
        for value, right in zip(found, expected, strict=True):
            torch.testing.assert_close(value, right.expand_as(value), rtol=1e-9, atol=1e-9)


def test_what_follows_may_change_the_output_in_place() -> None:
    layer = convert_batchnorm(nn.BatchNorm2d(3).double())
    plain = nn.BatchNorm2d(3).double()
    x = randn(1, 3, 2, 2)
    for module in (layer, plain):
        module(x).relu_().flatten(2).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def tokens(layer: _BatchNorm, x: Tensor, g: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return (y.flatten(2).transpose(1, 2) * g).sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("is_global", [False, True])
def test_a_compiled_layer_gives_the_same(backend: str, is_global: bool) -> None:
    torch.compiler.reset()
    x, g = randn(1, 5, 2, 2), randn(1, 4, 5, seed=1)
    layer = layer_for(x)
    expected = by_plain_operations(layer, x, g.transpose(1, 2).reshape(1, 5, 2, 2))
    run = torch.compile(tokens, backend=backend)
    x.requires_grad_()
    with federated_statistics(layer, 1.0) if is_global else nullcontext():
        run(layer, x, g).backward()
    for value, right in zip((x.grad, layer.weight.grad, layer.bias.grad), expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-9)
