"""Mean, variance and the two sums of the backward pass over a client's own batch, fused kernels.

Shapes: x and g (N, K C, ...), the channels of K clients side by side; results (K, C).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .transfer import constant


def statistics_dtype(x: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def local_moments(
    x: Tensor, mask_KN: Tensor | None, clients: int, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Each client's mean and biased variance per channel; of real samples alone if masked."""
    wide = statistics_dtype(x)
    if mask_KN is not None:
        return _masked_moments(x.to(wide), mask_KN, clients, counts)
    if x.numel() == 0:
        zeros = x.new_zeros(clients, x.size(1) // clients, dtype=wide)
        return zeros, zeros
    mean, variance = torch.batch_norm_update_stats(x.to(wide), None, None, 0.0)
    return mean.view(clients, -1), variance.view(clients, -1)


def _masked_moments(
    x: Tensor, mask_KN: Tensor, clients: int, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """By plain operations; padding must be finite."""
    values = x.reshape(len(x), clients, x.size(1) // clients, -1)  # (N, K, C, values of a sample)
    mask = mask_KN.t()[:, :, None, None].to(x.dtype)
    n_K1 = constant(tuple(counts), x.dtype, x.device).unsqueeze(1)
    mean_KC = (values * mask).sum((0, 3)) / n_K1
    deviations = (values - mean_KC[:, :, None]) * mask
    return mean_KC, deviations.square().sum((0, 3)) / n_K1


def local_sums(
    g: Tensor, x: Tensor, mean: Tensor, variance: Tensor, eps: float, clients: int
) -> tuple[Tensor, Tensor]:
    """Per client and channel sum g and sum g xhat; ``mean`` and ``variance`` are (K C,)."""
    wide = statistics_dtype(x)
    if x.numel() == 0:
        zeros = x.new_zeros(clients, x.size(1) // clients, dtype=wide)
        return zeros, zeros
    _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        g.to(wide),
        x.to(wide),
        None,
        mean,
        variance,
        None,
        None,
        False,
        eps,
        [False, True, True],
    )
    return dbeta.view(clients, -1), dgamma.view(clients, -1)
