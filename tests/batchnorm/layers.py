"""One use of a layer, clients' data for it, and what the pooled problem gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.helpers import pooled

Values = dict[str, Tensor]

GLOBAL_SHAPES = {"(N, C)": (3,), "(N, C, L)": (3, 7), "(N, C, H, W)": (3, 4, 5)}
TWO_WEIGHTS = [0.25, 0.75]


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
    parameters = dict(layer.named_parameters())
    y = layer(x)
    dx, *derivatives = torch.autograd.grad((y * g).sum(), [x, *parameters.values()])
    values = {"y": y.detach(), "dx": dx, **dict(layer.named_buffers())}
    for name, derivative in zip(parameters, derivatives, strict=True):
        values[f"d {name}"] = derivative
    return {name: value.clone() for name, value in values.items()}


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


def global_moments(p: list[float], xs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, by two passes over the clients that count."""
    dims = [dim for dim in range(xs[0].dim()) if dim != 1]
    terms = [(w, x) for w, x in zip(p, xs, strict=True) if w]
    mean = torch.stack([w * x.mean(dims, keepdim=True) for w, x in terms]).sum(0)
    variance = torch.stack([w * (x - mean).square().mean(dims) for w, x in terms]).sum(0)
    n = sum(x.numel() // x.size(1) for _, x in terms)
    return mean.flatten(), variance * n / (n - 1)
