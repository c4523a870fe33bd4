"""BN in a context as autograd and ``torch.func.vmap`` call it.

K clients of a rank may run stacked, under ``vmap``: their channels stand side by side, so that the
same kernels serve K x C channels.  Each use of a layer says whose statistics it is normalised by:
those of all clients (``shared_batch``) or of each client's own batch (``own_batch``).

Shapes: x and y (N, C) or (N, C, ...), stacked and folded (N, K C, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from . import global_kernels, local_kernels
from .statistics_call import LayerCall


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
        y, mean_C, variance_C = _normalise(x, gamma, beta, eps, call)
        ctx.save_for_backward(x, gamma, mean_C, variance_C)
        ctx.eps, ctx.call = eps, call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives of x, gamma and beta; always one collective, on every rank."""
        x, gamma, *moments = ctx.saved_tensors
        needs_dx = ctx.needs_input_grad[0]
        dx, dgamma_1C, dbeta_1C = _derivatives(g, x, gamma, moments, ctx.eps, ctx.call, needs_dx)
        wanted = zip((dx, dgamma_1C[0], dbeta_1C[0]), ctx.needs_input_grad, strict=False)
        return *(value if needed else None for value, needed in wanted), None, None


class StackedNormalise(torch.autograd.Function):
    """The same of clients under ``torch.func.vmap``; also returns the moments."""

    @staticmethod
    def forward(
        x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, call: LayerCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y and the shared mean_C and variance_C (biased)."""
        return _normalise(x, gamma, beta, eps, call)

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
        wanted = zip((dx, dgamma, dbeta), ctx.needs_input_grad, strict=False)
        return *(value if needed else None for value, needed in wanted), None, None

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
        y, mean_C, variance_C = _normalise(folded, gammas, betas, eps, call, clients)
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
        moments = mean_C, variance_C
        dx, dgamma_1C, dbeta_1C = _derivatives(g, x, gamma, moments, eps, call, needs_dx)
        return dx, dgamma_1C[0], dbeta_1C[0]

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


def _normalise(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    call: LayerCall,
    clients: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, and what ``_derivatives`` needs: a mean and a variance or r."""
    if call.own is not None:
        return local_kernels.normalise(x, gamma, beta, eps, call.own(), clients)
    return global_kernels.normalise(x, gamma, beta, eps, call, clients)


def _derivatives(
    g: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    moments: Sequence[Tensor],
    eps: float,
    call: LayerCall,
    needs_dx: bool,
    clients: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, or empty; dgamma and dbeta, (K, C) each, in gamma's dtype."""
    if call.own is not None:
        return local_kernels.derivatives(g, x, gamma, moments, needs_dx, clients)
    return global_kernels.derivatives(g, x, gamma, moments, eps, call, needs_dx, clients)


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
