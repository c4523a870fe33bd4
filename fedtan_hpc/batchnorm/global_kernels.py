"""Normalisation by shared statistics, differentiated through: the arithmetic of FedTAN's layer.

The loss is F = sum_k p_k F_k and g = dF_k/dy this client's own derivative.  With
xhat = (x - mean) r, r = 1 / sqrt(variance + eps), both moments global, the chain rule through them
(FedTAN, arXiv 2301.02982; averaged derivatives of the statistics, layer by layer) gives

    dx = r (gamma g - (s1 + xhat s2) / n_k)
    s1 = sum_j p_j gamma_j sum g_j,   s2 = sum_j p_j gamma_j sum g_j xhat_j

so the two sums s1, s2 per channel are all that the clients exchange in the backward pass; each
comes with its own gamma, for models differ after the first step of a round.
dgamma = sum g xhat and dbeta = sum g stay the client's own.

In local steps of a stack each client's moments and sums are its own, and the same arithmetic is
ordinary BN, of batches that are padded too.

Shapes: x and y (N, K C, ...), the channels of K clients side by side; n_k values per channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.transfer import constant
from .moments import local_moments, local_sums, statistics_dtype
from .statistics_call import LayerCall


def normalise(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    call: LayerCall,
    clients: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, and the moments that ``call`` shares, at least float32; one collective."""
    counts = _counts(x, call, clients)
    moments = local_moments(x, call.mask_KN, clients, counts)
    wide = statistics_dtype(x)
    mean_C, variance_C = call.share_moments(counts, *moments)
    y = torch.batch_norm(
        x,
        None if gamma is None else gamma.to(wide),
        None if beta is None else beta.to(wide),
        per_channel(mean_C, clients),
        per_channel(variance_C, clients),
        training=False,
        momentum=0.0,
        eps=eps,
        cudnn_enabled=False,
    )
    return y, mean_C, variance_C


def derivatives(
    g: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    moments: Sequence[Tensor],
    eps: float,
    call: LayerCall,
    needs_dx: bool,
    clients: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, or empty; dgamma and dbeta, (K, C) each, in gamma's dtype; one collective."""
    mean, variance = (per_channel(moment, clients) for moment in moments)
    counts = _counts(x, call, clients)
    r = (variance + eps).rsqrt_()
    dbeta_KC, dgamma_KC = local_sums(g, x, mean, r, clients)
    own_K2C = torch.stack([dbeta_KC, dgamma_KC], dim=1)
    if gamma is not None:
        own_K2C = own_K2C * gamma.view(clients, 1, -1)
    sums = call.share_derivatives(counts, own_K2C.flatten(1))
    dx = x.new_empty(0)
    if needs_dx:
        dx = _input_derivative(g, x, _coefficients(gamma, mean, r, _per_value(sums, counts)))
        if call.mask_KN is not None:  # nothing flows back into padding
            dx = dx.unflatten(1, (clients, -1)) * _like(call.mask_KN, x).to(dx.dtype)
            dx = dx.flatten(1, 2)
    dtype = dgamma_KC.dtype if gamma is None else gamma.dtype
    return dx, dgamma_KC.to(dtype), dbeta_KC.to(dtype)


def _per_value(sums: Tensor, counts: Sequence[int]) -> Tensor:
    """-s1 / n_k, -s2 / n_k, (2, K C), from sums of all clients, (2C,), or each one's, (K, 2C)."""
    if len(counts) == 1:  # a number divides quicker than a tensor
        return sums.view(2, -1) / -max(counts[0], 1)
    n_K1 = constant(tuple(counts), sums.dtype, sums.device).clamp_min(1).unsqueeze(1)
    per_value_K2C: Tensor = (sums / -n_K1).unflatten(1, (2, -1))
    return per_value_K2C.transpose(0, 1).flatten(1)


def _coefficients(
    gamma: Tensor | None, mean: Tensor, r: Tensor, per_value: Tensor
) -> Sequence[Tensor]:
    """Per channel a, b, c of dx = a g + b x + c, (K C,) each, in r's dtype."""
    first, second = (per_value.to(r.dtype) * r).unbind()
    slope = second * r
    scale = r if gamma is None else (r * gamma).to(r.dtype)
    return scale, slope, torch.addcmul(first, slope, mean, value=-1)


def _input_derivative(g: Tensor, x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """dx like x, in two passes over it."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    scale, slope, offset = (value.view(shape) for value in coefficients)
    return torch.addcmul(offset, x, slope).addcmul_(g, scale).to(x.dtype)


def _counts(x: Tensor, call: LayerCall, clients: int) -> Sequence[int]:
    """Values per channel of each client, padding apart."""
    per_sample = x.shape[2:].numel()
    if call.mask_KN is None:
        return [len(x) * per_sample] * clients
    return [size * per_sample for size in call.sizes]


def per_channel(moment: Tensor, clients: int) -> Tensor:
    """(K C,) from a global moment (C,), or from the clients' own (K, C)."""
    if clients == 1:
        return moment.view(-1)
    return moment.repeat(clients) if moment.dim() == 1 else moment.flatten()


def _like(mask_KN: Tensor, x: Tensor) -> Tensor:
    """The mask as (N, K, 1, ...), to multiply a tensor of x's shape, unfolded."""
    return mask_KN.t().reshape(*mask_KN.t().shape, 1, *[1] * (x.dim() - 2))
