"""BN by global statistics, differentiated through them: the arithmetic of FedTAN's layer.

The loss is F = sum_k p_k F_k, and g = dF_k/dy is the derivative of client k's loss.  With global
moments, r = 1 / sqrt(variance + eps) and xhat = (x - mean) r, the chain rule through the moments
(FedTAN, arXiv 2301.02982) gives

    dx = r (gamma g - (s1 + xhat s2) / n_k)
    s1 = sum_j p_j gamma_j sum g_j,   s2 = sum_j p_j gamma_j sum g_j xhat_j

The clients exchange only the two sums s1 and s2 per channel in the backward pass.  Each client
multiplies by its gamma, since models differ after the first step of a round.  dgamma = sum g xhat
and dbeta = sum g are not shared.

``layer`` uses ``Normalise`` for a single client; ``vmap_autograd`` uses the functions below it for
stacked clients, also in local steps with padded batches, where a call shares nothing.

Shapes: x, y, g (N, K C, ...), the channels of K clients side by side; n_k values per channel.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..runtime.transfer import constant
from .local_kernels import local_moments, local_sums, statistics_dtype
from .statistics_call import LayerCall


class Normalise(torch.autograd.Function):
    """BN of one client; a collective forward and one backward (two forward in float64)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, call: LayerCall
    ) -> Tensor:
        """Returns y; keeps the input and the moments, nothing else of the input's size.

        The moments are kept as (1, C).  Local BN keeps (C,), so that activation checkpointing,
        which compares shapes, refuses to take one for the other in a backward pass.
        """
        y, mean, r = normalise(x, gamma, beta, eps, call)
        ctx.save_for_backward(x, gamma, mean.view(1, -1), r.view(1, -1))
        ctx.call = call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the derivatives by x, gamma and beta; every rank takes part in the collective."""
        x, gamma, *moments = ctx.saved_tensors
        needs_dx = ctx.needs_input_grad[0]
        dx, dgamma_1C, dbeta_1C = derivatives(g, x, gamma, moments, ctx.call, needs_dx)
        values = zip((dx, dgamma_1C[0], dbeta_1C[0]), ctx.needs_input_grad, strict=False)
        return *(value if needed else None for value, needed in values), None, None


def normalise(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, call: LayerCall
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y like x, and the mean and r that ``call`` shares, (C,) or (K, C)."""
    counts = _counts(x, call)
    mean, variance = call.share_moments(counts, *local_moments(x, call.mask_KN, counts))
    wide = statistics_dtype(x)
    y = torch.batch_norm(
        x,
        None if gamma is None else gamma.to(wide),
        None if beta is None else beta.to(wide),
        _per_channel(mean, len(counts)),
        _per_channel(variance, len(counts)),
        training=False,
        momentum=0.0,
        eps=eps,
        cudnn_enabled=False,
    )
    return y, mean, (variance + eps).rsqrt_()


def derivatives(
    g: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    moments: Sequence[Tensor],
    call: LayerCall,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx like x, or empty; dgamma and dbeta, (K, C) each, in the dtype of gamma.

    ``moments`` are the mean and r of ``normalise``; one collective.
    """
    counts = _counts(x, call)
    clients = len(counts)
    mean, r = (_per_channel(moment, clients) for moment in moments)
    dbeta_KC, dgamma_KC = local_sums(g, x, mean, r, clients)
    sums_K2C = torch.stack([dbeta_KC, dgamma_KC], dim=1)
    if gamma is not None:
        sums_K2C = sums_K2C * gamma.view(clients, 1, -1)
    sums = call.share_derivatives(counts, sums_K2C.flatten(1))
    dx = x.new_empty(0)
    if needs_dx:
        dx = _input_derivative(g, x, _coefficients(gamma, mean, r, _per_value(sums, counts)))
        if call.mask_KN is not None:  # nothing flows back into padding
            mask_NK = call.mask_KN.t().to(dx.dtype)
            mask = mask_NK.view(*mask_NK.shape, *[1] * (x.dim() - 1))
            dx = (dx.unflatten(1, (clients, -1)) * mask).flatten(1, 2)
    dtype = dgamma_KC.dtype if gamma is None else gamma.dtype
    return dx, dgamma_KC.to(dtype), dbeta_KC.to(dtype)


def _per_value(sums: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns -s1 / n_k and -s2 / n_k, (2, K C), from shared sums (2C,) or local ones (K, 2C)."""
    if len(counts) == 1:  # dividing by a number is faster
        return sums.view(2, -1) / -max(counts[0], 1)
    n_K1 = constant(tuple(counts), sums.dtype, sums.device).clamp_min(1).unsqueeze(1)
    per_value_K2C: Tensor = (sums / -n_K1).unflatten(1, (2, -1))
    return per_value_K2C.transpose(0, 1).flatten(1)


def _coefficients(
    gamma: Tensor | None, mean: Tensor, r: Tensor, per_value: Tensor
) -> Sequence[Tensor]:
    """Returns a, b, c of dx = a g + b x + c per channel, (K C,) each, in the dtype of r."""
    first, second = (per_value.to(r.dtype) * r).unbind()
    slope = second * r
    scale = r if gamma is None else (r * gamma).to(r.dtype)
    return scale, slope, torch.addcmul(first, slope, mean, value=-1)


def _input_derivative(g: Tensor, x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """Returns dx like x, in two passes over it."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    scale, slope, offset = (value.view(shape) for value in coefficients)
    return torch.addcmul(offset, x, slope).addcmul_(g, scale).to(x.dtype)


def _counts(x: Tensor, call: LayerCall) -> Sequence[int]:
    per_sample = x.shape[2:].numel()
    return [size * per_sample for size in call.sizes or [len(x)]]


def _per_channel(moment: Tensor, clients: int) -> Tensor:
    """Returns (K C,) from a global moment (C,), or from one per client (K, C)."""
    if clients == 1:
        return moment.view(-1)
    return moment.repeat(clients) if moment.dim() == 1 else moment.flatten()
