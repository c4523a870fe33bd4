"""The layer with shared statistics as an operator: torch.compile takes it as one node each way.

What happens inside, collectives included, stays out of the graph: a compiled step has no breaks,
and the graph is the same for every round and any backend.  A layer is known to the operator by a
number, for operators take neither modules nor other objects.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .federation import LayerCall
from .normalise import derivatives, normalise


class Caller(Protocol):
    """A layer as the operator sees it."""

    def next_call(self) -> LayerCall:
        """Begin the next use of the layer."""


_CALLERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_USES: dict[int, list[LayerCall]] = defaultdict(list)
"""By layer those that the backward pass may still ask for."""
_numbers = itertools.count()


def register(caller: Caller) -> int:
    """The number by which the operator finds ``caller`` for as long as it lives."""
    number = next(_numbers)
    _CALLERS[number] = caller
    return number


def exchange_uses(number: int, uses: list[LayerCall]) -> list[LayerCall]:
    """Give a layer the ``uses`` of a context that it enters or returns to; those of the other."""
    others = _USES.pop(number, [])
    if uses:
        _USES[number] = uses
    return others


@torch.library.custom_op("fedtan_hpc::normalise", mutates_args=())
def apply(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, caller: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``normalise`` of x; y, mean_C and variance_C as there, and which use of the layer it was."""
    call = _CALLERS[caller].next_call()
    _USES[caller].append(call)
    y, mean_C, variance_C = normalise(x, gamma, beta, eps, call)
    use = torch.tensor(len(_USES[caller]) - 1)  # on the CPU: reading it waits for no device
    return y, mean_C, variance_C, use


@apply.register_fake
def _(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, caller: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = x.size(1)
    mean_C, variance_C = (x.new_empty(channels, dtype=torch.float64) for _ in range(2))
    return torch.empty_like(x), mean_C, variance_C, torch.empty((), dtype=torch.int64)


@torch.library.custom_op("fedtan_hpc::normalise_backward", mutates_args=())
def _apply_backward(
    g: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    mean_C: Tensor,
    variance_C: Tensor,
    use: Tensor,
    eps: float,
    caller: int,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``derivatives`` of x, gamma and beta."""
    call = _USES[caller][int(use)]
    return derivatives(g, x, gamma, (mean_C, variance_C), eps, call, needs_dx)


@_apply_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    mean_C: Tensor,
    variance_C: Tensor,
    use: Tensor,
    eps: float,
    caller: int,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if needs_dx else x.new_empty(0)
    dtype = torch.promote_types(x.dtype, torch.float32) if gamma is None else gamma.dtype
    dgamma, dbeta = (x.new_empty(x.size(1), dtype=dtype) for _ in range(2))
    return dx, dgamma, dbeta


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The input and the moments; nothing else of the input's size."""
    x, gamma, _, ctx.eps, ctx.caller = inputs
    ctx.save_for_backward(x, gamma, *output[1:])


def _differentiate(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gamma = ctx.saved_tensors[1]
    needs_dx = ctx.needs_input_grad[0]
    dx, dgamma, dbeta = _apply_backward(g, *ctx.saved_tensors, ctx.eps, ctx.caller, needs_dx)
    own = (None, None) if gamma is None else (dgamma, dbeta)
    return dx if needs_dx else None, *own, None, None


_register: Callable[..., None] = apply.register_autograd
_register(_differentiate, setup_context=_keep)
