"""Moments of clients' batches and the two sums of the backward pass, by fused kernels of torch.

``global_kernels`` shares them between clients.

Shapes: x and g (N, K C, ...), the channels of K clients side by side; results (K, C).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.transfer import constant


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of the statistics of ``x``: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def local_moments(
    x: Tensor, mask_KN: Tensor | None, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Returns each client's mean and biased variance per channel; a mask leaves out padding.

    ``counts`` has each client's values per channel.  Padding must be finite.
    """
    wide, clients = statistics_dtype(x), len(counts)
    if mask_KN is not None:
        return _masked_moments(x.to(wide), mask_KN, counts)
    if x.numel() == 0:
        zeros = x.new_zeros(clients, x.size(1) // clients, dtype=wide)
        return zeros, zeros
    values = x if x.is_cuda else x.to(wide)  # kernels of a GPU read any dtype and compute in wide
    mean, variance = torch.batch_norm_update_stats(values, None, None, 0.0)
    return mean.view(clients, -1), variance.view(clients, -1)


def _masked_moments(x: Tensor, mask_KN: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    values = x.reshape(len(x), len(counts), x.size(1) // len(counts), -1)  # (N, K, C, per sample)
    mask = mask_KN.t()[:, :, None, None].to(x.dtype)
    n_K1 = constant(tuple(counts), x.dtype, x.device).unsqueeze(1)
    mean_KC = (values * mask).sum((0, 3)) / n_K1
    deviations = (values - mean_KC[:, :, None]) * mask
    return mean_KC, deviations.square().sum((0, 3)) / n_K1


def local_sums(
    g: Tensor, x: Tensor, mean: Tensor, r: Tensor, clients: int
) -> tuple[Tensor, Tensor]:
    """Returns sum g and sum g xhat per client and channel; xhat = (x - mean) r, with (K C,)."""
    if x.numel() == 0:
        zeros = x.new_zeros(clients, x.size(1) // clients, dtype=statistics_dtype(x))
        return zeros, zeros
    sum_g, sum_g_xhat = (_sums_on_gpu if x.is_cuda else _sums_on_cpu)(g, x, mean, r)
    return sum_g.view(clients, -1), sum_g_xhat.view(clients, -1)


def _sums_on_cpu(g: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    wide = statistics_dtype(x)
    _, sum_g_xhat, sum_g = torch.ops.aten.native_batch_norm_backward(
        g.to(wide), x.to(wide), None, None, None, mean, r, True, 0.0, [False, True, True]
    )
    return sum_g, sum_g_xhat


def _sums_on_gpu(g: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Uses the kernel of SyncBatchNorm: on a GPU the CPU's one fails without gamma and dx."""
    sum_g, sum_g_deviation, *_ = torch.batch_norm_backward_reduce(
        g, x, mean, r, None, True, False, False
    )
    return sum_g, sum_g_deviation * r
