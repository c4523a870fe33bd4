"""Mean, variance and the two sums of the backward pass over a client's own batch, fused kernels.

Shapes: x and g (N, K C, ...), the channels of K clients side by side; results (K, C).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.transfer import constant


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
    values = x if x.is_cuda else x.to(wide)  # the kernels of a GPU widen what they read
    mean, variance = torch.batch_norm_update_stats(values, None, None, 0.0)
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
    g: Tensor, x: Tensor, mean: Tensor, r: Tensor, clients: int
) -> tuple[Tensor, Tensor]:
    """Per client and channel sum g and sum g xhat, xhat = (x - mean) r; those are (K C,)."""
    if x.numel() == 0:
        zeros = x.new_zeros(clients, x.size(1) // clients, dtype=statistics_dtype(x))
        return zeros, zeros
    of_g, of_g_xhat = (_sums_on_gpu if x.is_cuda else _sums_on_cpu)(g, x, mean, r)
    return of_g.view(clients, -1), of_g_xhat.view(clients, -1)


def _sums_on_cpu(g: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    wide = statistics_dtype(x)
    _, of_g_xhat, of_g = torch.ops.aten.native_batch_norm_backward(
        g.to(wide), x.to(wide), None, None, None, mean, r, True, 0.0, [False, True, True]
    )
    return of_g, of_g_xhat


def _sums_on_gpu(g: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """By the kernel of torch's SyncBatchNorm: the one above fails there without gamma and dx."""
    of_g, of_g_deviation, *_ = torch.batch_norm_backward_reduce(
        g, x, mean, r, None, True, False, False
    )
    return of_g, of_g_deviation * r
