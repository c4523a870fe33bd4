"""Normalisation by shared statistics, differentiated through: the arithmetic of FedTAN's layer.

The loss is F = sum_k p_k F_k and g = dF_k/dy this client's own derivative.  With
xhat = (x - mean) r, r = 1 / sqrt(variance + eps), both moments global, the chain rule through them
(FedTAN, arXiv 2301.02982; averaged derivatives of the statistics, layer by layer) gives

    dx = r (gamma g - (s1 + xhat s2) / n_k)
    s1 = sum_j p_j gamma_j sum g_j,   s2 = sum_j p_j gamma_j sum g_j xhat_j

so the two sums s1, s2 per channel are all that the clients exchange in the backward pass; each
comes with its own gamma, for models differ after the first step of a round.
dgamma = sum g xhat and dbeta = sum g stay the client's own.

K clients of a rank may run stacked, under ``torch.func.vmap``: their channels stand side by side,
so that the same kernels serve K x C channels.  In local steps of a stack each client's moments and
sums are its own, and the same arithmetic is ordinary BN.

Shapes: x and y (N, C) or (N, C, ...), stacked and folded (N, K C, ...); n_k values per channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .federation import LayerCall
from .moments import local_moments, local_sums, statistics_dtype
from .transfer import constant


class Normalise(torch.autograd.Function):
    """y = gamma (x - mean) / sqrt(variance + eps) + beta of one client."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        call: LayerCall,
    ) -> Tensor:
        """Return y; the input and the moments are kept, and nothing else of the input's size."""
        y, mean_C, variance_C = normalise(x, gamma, beta, eps, call)
        ctx.save_for_backward(x, gamma, mean_C, variance_C)
        ctx.eps, ctx.call = eps, call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives of x, gamma and beta; always one collective, on every rank."""
        x, gamma, *moments = ctx.saved_tensors
        needs_dx = ctx.needs_input_grad[0]
        dx, dgamma, dbeta = derivatives(g, x, gamma, moments, ctx.eps, ctx.call, needs_dx)
        own = (None, None) if gamma is None else (dgamma, dbeta)
        return dx if needs_dx else None, *own, None, None


class StackedNormalise(torch.autograd.Function):
    """The same of clients under ``torch.func.vmap``; also returns the moments."""

    @staticmethod
    def forward(
        x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, call: LayerCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y and the shared mean_C and variance_C (biased)."""
        return normalise(x, gamma, beta, eps, call)

    @staticmethod
    def setup_context(
        ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
    ) -> None:
        """Keep the input and the moments; nothing else of the input's size."""
        x, gamma, _, ctx.eps, ctx.call = inputs  # type: ignore[attr-defined]
        _, mean_C, variance_C = output
        ctx.mark_non_differentiable(mean_C, variance_C)
        ctx.save_for_backward(x, gamma, mean_C, variance_C)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives of x, gamma and beta; always one collective, on every rank."""
        needs_dx = ctx.needs_input_grad[0]
        dx, dgamma, dbeta = NormaliseBackward.apply(  # type: ignore[no-untyped-call]
            g, *ctx.saved_tensors, ctx.eps, ctx.call, needs_dx
        )
        if ctx.saved_tensors[1] is None:
            dgamma = dbeta = None
        return dx if needs_dx else None, dgamma, dbeta, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        call: LayerCall,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int | None, int | None]]:
        """All clients of a stack at once, and one collective for all of them."""
        clients: int = info.batch_size
        folded = _fold(x, in_dims[0], clients)
        gammas = _fold_parameter(gamma, in_dims[1], clients)
        betas = _fold_parameter(beta, in_dims[2], clients)
        y, mean_C, variance_C = normalise(folded, gammas, betas, eps, call, clients)
        own = None if mean_C.dim() == 1 else 0
        return (y.unflatten(1, (clients, -1)), mean_C, variance_C), (1, own, own)


class NormaliseBackward(torch.autograd.Function):
    """The derivatives; a function of its own, for a stack of clients takes it all at once."""

    @staticmethod
    def forward(
        g: Tensor,
        x: Tensor,
        gamma: Tensor | None,
        mean_C: Tensor,
        variance_C: Tensor,
        eps: float,
        call: LayerCall,
        needs_dx: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dx (empty unless needed), dgamma and dbeta, both (C,)."""
        return derivatives(g, x, gamma, (mean_C, variance_C), eps, call, needs_dx)

    @staticmethod
    def setup_context(
        ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
    ) -> None:
        """Nothing is kept: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        """Refused."""
        raise RuntimeError("global statistics can be differentiated once, not twice")

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        g: Tensor,
        x: Tensor,
        gamma: Tensor | None,
        mean_C: Tensor,
        variance_C: Tensor,
        eps: float,
        call: LayerCall,
        needs_dx: bool,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
        """All clients of a stack at once, and one collective for all of them."""
        clients: int = info.batch_size
        folded_g, folded_x = (_fold(v, d, clients) for v, d in ((g, in_dims[0]), (x, in_dims[1])))
        gammas = _fold_parameter(gamma, in_dims[2], clients)
        moments = mean_C, variance_C
        dx, dgamma_KC, dbeta_KC = _derivatives(
            folded_g, folded_x, gammas, moments, eps, call, needs_dx, clients
        )
        dx = dx.unflatten(1, (clients, -1)) if needs_dx else dx.expand(clients, 0)
        return (dx, dgamma_KC, dbeta_KC), (1 if needs_dx else 0, 0, 0)


def normalise(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    call: LayerCall,
    clients: int = 1,
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
        _per_channel(mean_C, clients),
        _per_channel(variance_C, clients),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, or empty; dgamma and dbeta, (C,) in gamma's dtype; one collective."""
    dx, dgamma_KC, dbeta_KC = _derivatives(g, x, gamma, moments, eps, call, needs_dx, 1)
    return dx, dgamma_KC[0], dbeta_KC[0]


def _derivatives(
    g: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    moments: Sequence[Tensor],
    eps: float,
    call: LayerCall,
    needs_dx: bool,
    clients: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, or empty; dgamma and dbeta, (K, C) each, in gamma's dtype."""
    counts = _counts(x, call, clients)
    mean, variance = (_per_channel(moment, clients) for moment in moments)
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


def _fold(value: Tensor, dim: int | None, clients: int) -> Tensor:
    """(N, K C, ...) from a stacked tensor with its clients at ``dim``, or one for all clients."""
    if dim is None:
        return value.repeat(1, clients, *[1] * (value.dim() - 2))
    return value.movedim(dim, 1).flatten(1, 2)


def _fold_parameter(value: Tensor | None, dim: int | None, clients: int) -> Tensor | None:
    """(K C,) from a stacked parameter, or one for all clients."""
    if value is None:
        return None
    return value.repeat(clients) if dim is None else value.movedim(dim, 0).flatten()


def _per_channel(moment: Tensor, clients: int) -> Tensor:
    """(K C,) from a global moment (C,), or from the clients' own (K, C)."""
    if clients == 1:
        return moment.view(-1)
    return moment.repeat(clients) if moment.dim() == 1 else moment.flatten()


def _like(mask_KN: Tensor, x: Tensor) -> Tensor:
    """The mask as (N, K, 1, ...), to multiply a tensor of x's shape, unfolded."""
    return mask_KN.t().reshape(*mask_KN.t().shape, 1, *[1] * (x.dim() - 2))
