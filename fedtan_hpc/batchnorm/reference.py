"""FedTAN's batch normalization in ordinary differentiable operations.

Slow and short, as the definition reads: the tests compare ``global_kernels`` with it.
"""

from typing import Any

import torch
from torch import Tensor

from ..distributed import collectives


class ClientMean(torch.autograd.Function):
    """sum_k p_k v_k over the clients, a mean that is its own adjoint.

    Client k's gradient is that of its loss F_k, and the global loss is sum_k p_k F_k.  Per unit of
    p_k, the derivative by v_k is therefore the same weighted sum of the incoming gradients.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: float) -> Tensor:
        """Returns the weighted sum over ranks of ``value``, which has one shape on all ranks."""
        ctx.weight = weight
        return collectives.sum_for_training(value * weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Returns the weighted sum over ranks of the gradients."""
        return collectives.sum_for_training(gradient * ctx.weight), None


def client_mean(value: Tensor, weight: float) -> Tensor:
    """Returns the ``ClientMean`` of ``value``; ``weight`` is this client's p_k."""
    return ClientMean.apply(value, weight)  # type: ignore[no-untyped-call, no-any-return]


def batch_norm(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, weight: float
) -> Tensor:
    """Normalises ``x``, (N, C) or (N, C, ...), by the moments of all clients.

    mean = sum_k p_k mean_k(x), variance = sum_k p_k mean_k((x - mean)^2).
    """
    others = [dim for dim in range(x.dim()) if dim != 1]
    mean = client_mean(x.mean(others, keepdim=True), weight)
    variance = client_mean((x - mean).square().mean(others, keepdim=True), weight)
    xhat = (x - mean) / torch.sqrt(variance + eps)
    scale = torch.ones_like(mean) if gamma is None else gamma.view_as(mean)
    shift = torch.zeros_like(mean) if beta is None else beta.view_as(mean)
    return xhat * scale + shift
