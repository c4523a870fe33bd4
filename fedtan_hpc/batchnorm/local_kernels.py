"""BN of stacked clients by the statistics of their whole batches, with torch's kernels for BN.

``vmap_autograd`` uses them in local steps without padding.

Shapes: x and g (N, K C, ...), the channels of K clients side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RunningBuffers:
    """The clients' running statistics side by side, (K C,), which a kernel moves, or None."""

    mean: Tensor | None
    variance: Tensor | None
    momentum: float


def normalise(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    running: RunningBuffers,
    clients: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y like x, and each client's mean and r = 1 / sqrt(variance + eps), (K, C)."""
    if x.numel() < 2 * x.size(1):
        raise ValueError("one value per channel in a client's batch; a variance needs two")
    statistics = running.mean, running.variance, True, running.momentum, eps
    y, mean, r = torch.ops.aten.native_batch_norm(x, gamma, beta, *statistics)
    return y, mean.view(clients, -1), r.view(clients, -1)


def derivatives(
    g: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    moments: Sequence[Tensor],
    needs_dx: bool,
    clients: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx like x, or empty; dgamma and dbeta, (K, C) each, 0 without a gamma.

    ``moments`` are the mean and r of ``normalise``.
    """
    wanted = [needs_dx, gamma is not None, gamma is not None]
    mean, r = (moment.flatten() for moment in moments)
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        g, x, gamma, None, None, mean, r, True, 0.0, wanted
    )
    if gamma is None:
        dgamma = dbeta = torch.zeros_like(mean)
    return dx if needs_dx else x.new_empty(0), dgamma.view(clients, -1), dbeta.view(clients, -1)
