"""The pooled problem in one process: F = sum_k p_k F_k with BN statistics over all clients.

Written with plain tensor operations and autograd alone; it uses nothing of the package.  The sum of
the clients' gradients is here too, to be compared with it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class PooledBatchNorm(nn.Module):
    """Normalises the clients' concatenated batch by sum_k p_k of their moments."""

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm, sizes: list[int], p: list[float]):
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.sizes, self.p = sizes, p

    def forward(self, x: Tensor) -> Tensor:
        others = [dim for dim in range(x.dim()) if dim != 1]
        parts = x.split(self.sizes)
        terms = zip(self.p, parts, strict=True)
        mean = torch.stack([p * part.mean(others, keepdim=True) for p, part in terms]).sum(0)
        terms = zip(self.p, parts, strict=True)
        squares = [p * (part - mean).square().mean(others, keepdim=True) for p, part in terms]
        self.mean, self.variance = mean.flatten(), torch.stack(squares).sum(0).flatten()
        y = (x - mean) / torch.sqrt(self.variance.view_as(mean) + self.eps)
        if self.weight is None:
            return y
        return y * self.weight.view_as(mean) + self.bias.view_as(mean)


def pool(module: nn.Module, sizes: list[int], p: list[float]) -> nn.Module:
    """``module`` with its BN layers replaced by pooled ones; parameters stay shared."""
    pooled: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                parent._modules[name] = pooled.setdefault(child, PooledBatchNorm(child, sizes, p))
    return module


def pooled_gradient(
    module: nn.Module, clients: list[tuple[Tensor, Tensor]], p: list[float]
) -> dict[str, Tensor]:
    """The gradient of sum_k p_k F_k by parameter name."""
    sizes = [len(y) for _, y in clients]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    module = pool(module, sizes, p)
    outputs = module(torch.cat([x for x, _ in clients])).split(sizes)
    terms = zip(p, outputs, clients, strict=True)
    loss = torch.stack([p_k * cross_entropy(out, y) for p_k, out, (_, y) in terms]).sum()
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    return {names[id(w)]: g for w, g in zip(parameters, gradients, strict=True)}


def summed_over_ranks(module: nn.Module, p: float) -> dict[str, Tensor]:
    """sum_k p_k g_k by parameter name; this rank is a client of weight p with gradients g_k."""
    sums = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        sums[name] = p * parameter.grad
        dist.all_reduce(sums[name])
    return sums


def worst_relative_error(measured: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ||measured - expected|| / ||expected|| of any tensor.

    For tensors that are 0 up to rounding (a bias before BN) the norm of the largest gradient takes
    the place of ||expected||.
    """
    assert measured.keys() == expected.keys()
    largest = max(float(value.norm()) for value in expected.values())
    errors = []
    for name, value in expected.items():
        scale = float(value.norm())
        scale = largest if scale < 1e-9 * largest else scale
        errors.append(float((measured[name] - value).norm()) / scale)
    return max(errors)
