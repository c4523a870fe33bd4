"""FedTAN's batch normalization as it is understood, with ordinary differentiable operations.

Slow and short: the tests compare the layer that is used (``shared_batch.py``) with this one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed import collectives


class ClientMean(torch.autograd.Function):
    """sum_k p_k v_k over the clients, a mean that is its own adjoint.

    Client k's gradient is that of its own loss F_k, and the global loss is sum_k p_k F_k.  So what
    flows back into v_k, per unit of p_k, is the same weighted sum of the incoming gradients.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: float) -> Tensor:
        """The weighted sum over ranks of ``value`` (any shape, the same on all ranks)."""
        ctx.weight = weight
        return collectives.sum_for_training(value * weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The weighted sum over ranks of the gradients."""
        return collectives.sum_for_training(gradient * ctx.weight), None


def client_mean(value: Tensor, weight: float) -> Tensor:
    """``ClientMean`` of ``value``; ``weight`` is this client's p_k."""
    return ClientMean.apply(value, weight)  # type: ignore[no-untyped-call, no-any-return]


def batch_norm(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, weight: float
) -> Tensor:
    """Normalise ``x``, (N, C) or (N, C, ...), by the moments of all clients.

    mean = sum_k p_k mean_k(x), variance = sum_k p_k mean_k((x - mean)^2).
    """
    others = [dim for dim in range(x.dim()) if dim != 1]
    mean = client_mean(x.mean(others, keepdim=True), weight)
    variance = client_mean((x - mean).square().mean(others, keepdim=True), weight)
    xhat = (x - mean) / torch.sqrt(variance + eps)
    scale = torch.ones_like(mean) if gamma is None else gamma.view_as(mean)
    shift = torch.zeros_like(mean) if beta is None else beta.view_as(mean)
    return xhat * scale + shift
