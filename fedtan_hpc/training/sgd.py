"""torch's fused SGD, made safe: it reads gradients and momentum in the parameters' own order.

The fused kernels walk through memory, and take a gradient that lies otherwise (channels first for a
parameter that is channels last) for another gradient, without a word (torch 2.13, CPU).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def sgd(
    values: Iterable[Tensor], rate: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """An optimizer for ``step``."""
    return torch.optim.SGD(
        values, lr=rate, momentum=momentum, weight_decay=weight_decay, fused=True
    )


@torch.no_grad()
def step(optimizer: torch.optim.Optimizer) -> None:
    """One step of all parameters that have gradients."""
    for group in optimizer.param_groups:
        for value in group["params"]:
            if value.grad is not None:
                value.grad = _lying_as(value, value.grad)
                state = optimizer.state[value]
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"] = _lying_as(value, state["momentum_buffer"])
    optimizer.step()


def _lying_as(value: Tensor, other: Tensor) -> Tensor:
    """``other`` in the order in memory of ``value``."""
    if _order(other) == _order(value):
        return other
    return torch.empty_like(value).copy_(other)


def _order(value: Tensor) -> list[int]:
    """Strides of the dimensions that have more than one place: the others' mean nothing."""
    return [step for size, step in zip(value.shape, value.stride(), strict=True) if size > 1]
