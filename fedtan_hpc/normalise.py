"""Normalisation by global statistics, differentiated through: the arithmetic of FedTAN's layer.

The loss is F = sum_k p_k F_k and g = dF_k/dy this client's own derivative.  With
xhat = (x - mean) r, r = 1 / sqrt(variance + eps), both moments global, the chain rule through them
(FedTAN, arXiv 2301.02982; averaged derivatives of the statistics, layer by layer) gives

    dx = gamma r (g - (s1 + xhat s2) / n_k)
    s1 = sum_j p_j sum g_j,   s2 = sum_j p_j sum g_j xhat_j

so the two sums s1, s2 per channel are all that the clients exchange in the backward pass.
dgamma = sum g xhat and dbeta = sum g stay the client's own.

Shapes: x and y (N, C) or (N, C, ...); C channels; n_k values per channel on this client.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .federation import LayerCall
from .messages import Share


class GlobalNormalise(torch.autograd.Function):
    """y = gamma (x - mean) / sqrt(variance + eps) + beta; also returns the global moments."""

    @staticmethod
    def forward(
        x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, call: LayerCall
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y, and in float64 mean_C, variance_C (biased) and the global count (0-d)."""
        share = _share(x, call)
        moments = call.share_moments(share, *_local_moments(x, share))
        wide = _statistics_dtype(x)
        y = torch.batch_norm(
            x,
            _cast(gamma, wide),
            _cast(beta, wide),
            moments.mean_C.to(wide),
            moments.variance_C.to(wide),
            training=False,
            momentum=0.0,
            eps=eps,
            cudnn_enabled=False,
        )
        return y, moments.mean_C, moments.variance_C, moments.count

    @staticmethod
    def setup_context(
        ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
    ) -> None:
        """Keep the input and the moments; nothing else of the input's size."""
        x, gamma, _, ctx.eps, ctx.call = inputs  # type: ignore[attr-defined]
        _, mean_C, variance_C, count = output
        ctx.mark_non_differentiable(mean_C, variance_C, count)
        ctx.save_for_backward(x, gamma, mean_C, variance_C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """Derivatives of x, gamma and beta; always one collective, on every rank."""
        x, gamma, mean_C, variance_C = ctx.saved_tensors
        share = _share(x, ctx.call)
        dbeta, dgamma = _local_sums(g, x, mean_C, variance_C, ctx.eps)
        sums_2C = ctx.call.share_derivatives(share, torch.cat([dbeta, dgamma]))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _input_derivative(g, x, gamma, mean_C, variance_C, ctx.eps, sums_2C, share.count)
        return dx, _cast_like(dgamma, gamma), _cast_like(dbeta, gamma), None, None


def _share(x: Tensor, call: LayerCall) -> Share:
    return Share(call.federation.weight, x.numel() // max(x.size(1), 1))


def _statistics_dtype(x: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


def _cast_like(value: Tensor, like: Tensor | None) -> Tensor | None:
    return None if like is None else value.to(like.dtype)


def _local_moments(x: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of this client's batch; zeros if it takes no part."""
    wide = _statistics_dtype(x)
    if not share.takes_part:
        zeros = x.new_zeros(x.size(1), dtype=wide)
        return zeros, zeros
    mean_C, variance_C = torch.batch_norm_update_stats(x.to(wide), None, None, 0.0)
    return mean_C, variance_C


def _local_sums(
    g: Tensor, x: Tensor, mean_C: Tensor, variance_C: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Per channel sum g and sum g xhat of this client."""
    wide = _statistics_dtype(x)
    if x.numel() == 0:
        zeros = mean_C.new_zeros(mean_C.shape, dtype=wide)
        return zeros, zeros
    _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        g.to(wide),
        x.to(wide),
        torch.ones_like(mean_C, dtype=wide),
        mean_C.to(wide),
        variance_C.to(wide),
        None,
        None,
        False,
        eps,
        [False, True, True],
    )
    return dbeta, dgamma


def _input_derivative(
    g: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    mean_C: Tensor,
    variance_C: Tensor,
    eps: float,
    sums_2C: Tensor,
    count: int,
) -> Tensor:
    """dx = scale g + slope (x - mean) + offset, with one coefficient each per channel."""
    wide = _statistics_dtype(x)
    s1_C, s2_C = (sums_2C / max(count, 1)).chunk(2)
    r_C = (variance_C + eps).rsqrt()
    scale_C = r_C if gamma is None else r_C * gamma
    slope_C = -scale_C * r_C * s2_C
    offset_C = -scale_C * s1_C - slope_C * mean_C
    shape = [1, -1] + [1] * (x.dim() - 2)
    scale, slope, offset = (v.to(wide).view(shape) for v in (scale_C, slope_C, offset_C))
    return torch.addcmul(offset, x.to(wide), slope).addcmul_(g.to(wide), scale).to(x.dtype)
