"""BN by global statistics, differentiated through them: the arithmetic of FedTAN's layer.

The loss is F = sum_k p_k F_k, and g = dF_k/dy is the derivative of client k's loss.  With global
moments, r = 1 / sqrt(variance + eps) and xhat = (x - mean) r, the chain rule through the moments
(FedTAN, arXiv 2301.02982) gives

    dx = r gamma g - (r s1 + xhat r s2) / n_k
    s1 = sum_j p_j gamma_j sum g_j,   s2 = sum_j p_j gamma_j sum g_j xhat_j

The clients exchange only r s1 and r s2, two sums per channel, in the backward pass.  Each client
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
from .messages import Derivatives
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
        y, mean, spread = normalise(x, gamma, beta, eps, call)
        ctx.save_for_backward(x, gamma, mean.view(1, -1), spread.view(1, -1))
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
    """Returns y like x, and the shared mean and variance + eps, (C,) or (K, C) each."""
    counts, wide = _counts(x, call), statistics_dtype(x)
    mean, variance = call.share_moments(counts, *local_moments(x, call.mask_KN, counts))
    spread = variance + eps
    gamma, beta = (None if value is None else value.to(wide) for value in (gamma, beta))
    mean_KC, spread_KC = (_per_channel(moment, len(counts)) for moment in (mean, spread))
    return _affine(x, gamma, beta, mean_KC, spread_KC), mean, spread


def derivatives(
    g: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    moments: Sequence[Tensor],
    call: LayerCall,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx like x, or empty; dgamma and dbeta, (K, C) each, in the dtype of gamma.

    ``moments`` are mean and variance + eps, as ``normalise`` returns them; one collective.
    """
    counts = _counts(x, call)
    clients = len(counts)
    mean, spread = (_per_channel(moment, clients) for moment in moments)
    r = spread.rsqrt()
    dbeta_KC, dgamma_KC = local_sums(g, x, mean, r, clients)
    factor = r if gamma is None else (r * gamma).to(r.dtype)
    sums = Derivatives(dbeta_KC, dgamma_KC, factor.view(clients, -1))
    shared = call.share_derivatives(counts, sums)
    dtype = dgamma_KC.dtype if gamma is None else gamma.dtype
    parameters = dgamma_KC.to(dtype), dbeta_KC.to(dtype)
    if not needs_dx:
        return x.new_empty(0), *parameters
    first, second = _per_value(shared, counts).to(r.dtype)
    shape = [1, -1] + [1] * (x.dim() - 2)
    if x.dtype is r.dtype:
        dx = _affine(x, second, first, mean, spread)
    else:  # half precision, without a copy of x in the other dtype
        slope = second * r
        dx = torch.addcmul((first - slope * mean).view(shape), x, slope.view(shape))
    dx = dx.addcmul_(g, factor.view(shape)).to(x.dtype)
    if call.mask_KN is not None:  # nothing flows back into padding
        mask_NK = call.mask_KN.t().to(dx.dtype)
        mask = mask_NK.view(*mask_NK.shape, *[1] * (x.dim() - 1))
        dx = (dx.unflatten(1, (clients, -1)) * mask).flatten(1, 2)
    return dx, *parameters


def _per_value(sums: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns -r s1 / n_k and -r s2 / n_k, (2, K C); ``sums`` are (2C,), or (K, 2C) local ones."""
    if len(counts) == 1:  # dividing by a number is faster
        return sums.view(2, -1) / -max(counts[0], 1)
    n_K1 = constant(tuple(counts), sums.dtype, sums.device).clamp_min(1).unsqueeze(1)
    per_value_K2C: Tensor = (sums / -n_K1).unflatten(1, (2, -1))
    return per_value_K2C.transpose(0, 1).flatten(1)


def _affine(
    x: Tensor, scale: Tensor | None, offset: Tensor | None, mean: Tensor, spread: Tensor
) -> Tensor:
    """Returns scale (x - mean) / sqrt(spread) + offset per channel, like x, with torch's kernel."""
    if x.numel() == 0:  # not all kernels take it
        return torch.empty_like(x)
    return torch.native_batch_norm(x, scale, offset, mean, spread, False, 0.0, 0.0)[0]


def _counts(x: Tensor, call: LayerCall) -> Sequence[int]:
    per_sample = x.shape[2:].numel()
    return [size * per_sample for size in call.sizes or [len(x)]]


def _per_channel(moment: Tensor, clients: int) -> Tensor:
    """Returns (K C,) from a global moment (C,), or from one per client (K, C)."""
    if clients == 1:
        return moment.view(-1)
    return moment.repeat(clients) if moment.dim() == 1 else moment.flatten()
