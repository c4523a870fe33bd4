"""torch's kernels for BN on clients' own batches: moments, the backward pass's sums, local BN.

``global_kernels`` shares the moments and sums between clients.  ``vmap_autograd`` takes
``normalise`` and ``derivatives`` in local steps without padding, ``layer`` ``AlignedGradient``.

torch's kernels for the CPU (2.13) read a gradient in the wrong order if its strides are not those
of x and one of N and the sizes after C is 1, so that ``is_contiguous`` says yes to several memory
formats.  Gradients therefore get the strides of x first (``aligned``).

Shapes: x and g (N, K C, ...), the channels of K clients side by side; moments and sums (K, C).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.transfer import constant


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of the statistics of ``x``: at least float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


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
    sum_g, sum_g_xhat = (_sums_on_gpu if x.is_cuda else _sums_on_cpu)(aligned(g, x), x, mean, r)
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


def aligned(g: Tensor, x: Tensor) -> Tensor:
    """Returns ``g`` with the strides that ``empty_like`` gives to ``x``; itself if it has them."""
    if g.stride() == x.stride():
        return g
    return torch.empty_like(x, dtype=g.dtype).copy_(g)


def needs_aligned_gradient(x: Tensor) -> bool:
    """Returns whether torch's BN of ``x`` may read a gradient of other strides in a wrong order."""
    return x.dim() > 3 and x.device.type == "cpu" and 1 in (len(x), *x.shape[2:])


class AlignedGradient(torch.autograd.Function):
    """The identity, whose backward pass gives the gradient the strides of the values."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        """Returns a copy of ``y``: what follows may change it in place."""
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keeps the strides."""
        ctx.strides = output.stride()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """Returns a copy of ``g`` with the strides of the values."""
        return g.new_empty_strided(g.shape, ctx.strides).copy_(g)


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
        aligned(g, x), x, gamma, None, None, mean, r, True, 0.0, wanted
    )
    if gamma is None:
        dgamma = dbeta = torch.zeros_like(mean)
    return dx if needs_dx else x.new_empty(0), dgamma.view(clients, -1), dbeta.view(clients, -1)
