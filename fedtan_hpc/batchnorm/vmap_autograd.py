"""BN of clients that one rank stacks, as autograd and ``torch.func.vmap`` call it.

``torch.func.vmap`` hands a layer the tensors of all K clients.  Their channels are laid side by
side, so that the kernels for one client serve K C channels.  Each use of a layer has global
statistics (``global_kernels``) or those of each client's batch (``local_kernels``).
``layer`` uses this module in contexts of stacked clients.

Shapes: x and y (N, C) or (N, C, ...) for each client, folded (N, K C, ...).
"""

from typing import Any

import torch
from torch import Tensor

from . import global_kernels, local_kernels
from .statistics_call import LayerCall

_SAME_INPUT = "stacked clients must differ in the input of a BN layer: it depends on none of them"


class StackedNormalise(torch.autograd.Function):
    """BN of stacked clients; returns y, and the moments that the backward pass needs."""

    @staticmethod
    def forward(*_: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Refused: ``vmap`` is called for inputs that belong to clients."""
        raise RuntimeError(_SAME_INPUT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the input and the moments, nothing else of the input's size."""
        x, gamma, _, _, ctx.call = inputs
        _, *moments = output
        ctx.mark_non_differentiable(*moments)
        ctx.save_for_backward(x, gamma, *moments)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the derivatives by x, gamma and beta; every rank takes part in the collective."""
        needs_dx = ctx.needs_input_grad[0]
        derivatives = StackedDerivatives.apply(  # type: ignore[no-untyped-call]
            g, *ctx.saved_tensors, ctx.call, needs_dx
        )
        values = zip(derivatives, ctx.needs_input_grad, strict=False)
        return *(value if needed else None for value, needed in values), None, None

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
        """Normalises for all clients at once."""
        clients: int = info.batch_size
        x = _fold(x, in_dims[0], clients)
        gamma = _fold_parameter(gamma, in_dims[1], clients)
        beta = _fold_parameter(beta, in_dims[2], clients)
        if call.local_buffers is None:
            y, *moments = global_kernels.normalise(x, gamma, beta, eps, call)
        else:
            buffers = call.local_buffers()
            y, *moments = local_kernels.normalise(x, gamma, beta, eps, buffers, clients)
        mean, spread = moments
        moment_dim = None if mean.dim() == 1 else 0
        return (y.unflatten(1, (clients, -1)), mean, spread), (1, moment_dim, moment_dim)


class StackedDerivatives(torch.autograd.Function):
    """The backward pass of ``StackedNormalise``; a function itself, so that it is stacked too."""

    @staticmethod
    def forward(*_: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Refused: ``vmap`` is called for inputs that belong to clients."""
        raise RuntimeError(_SAME_INPUT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps nothing: there is no second derivative."""

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
        mean: Tensor,
        spread: Tensor,
        call: LayerCall,
        needs_dx: bool,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
        """Returns dx (empty unless needed), dgamma and dbeta for all clients at once."""
        clients: int = info.batch_size
        g, x = _fold(g, in_dims[0], clients), _fold(x, in_dims[1], clients)
        gamma, moments = _fold_parameter(gamma, in_dims[2], clients), (mean, spread)
        if call.local_buffers is None:
            result = global_kernels.derivatives(g, x, gamma, moments, call, needs_dx)
        else:
            result = local_kernels.derivatives(g, x, gamma, moments, needs_dx, clients)
        dx, dgamma_KC, dbeta_KC = result
        dx = dx.unflatten(1, (clients, -1)) if needs_dx else dx.expand(clients, 0)
        return (dx, dgamma_KC, dbeta_KC), (1 if needs_dx else 0, 0, 0)


def _fold(value: Tensor, dim: int | None, clients: int) -> Tensor:
    """Returns (N, K C, ...) from a tensor with its clients at ``dim``, or one for all clients."""
    if dim is None:
        return value.repeat(1, clients, *[1] * (value.dim() - 2))
    return value.movedim(dim, 1).flatten(1, 2)


def _fold_parameter(value: Tensor | None, dim: int | None, clients: int) -> Tensor | None:
    """Returns (K C,) from a stacked parameter, or from one for all clients."""
    if value is None:
        return None
    return value.repeat(clients) if dim is None else value.movedim(dim, 0).flatten()
