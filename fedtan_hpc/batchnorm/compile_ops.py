"""The layer with shared statistics as torch.compile sees it.

Its arithmetic is ordinary operations, which the compiler merges with those around them.  The
exchange of statistics is an operator each way, and what happens inside, collectives included, stays
out of the graph: a compiled step has no breaks, and the graph is the same for every round and any
backend.  A layer is known to the operators by a number, for they take neither modules nor other
objects.

Shapes: x and y (N, C) or (N, C, ...).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .moments import statistics_dtype
from .statistics_call import LayerCall


class Caller(Protocol):
    """A layer as the operators see it."""

    uses: list[int]
    """Numbers of those that the backward pass may still ask for."""

    def next_call(self) -> LayerCall:
        """Begin the next use of the layer."""


_CALLERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_USES: dict[int, LayerCall] = {}
_numbers = itertools.count()
_LAST = [torch.zeros((), dtype=torch.int64, device="cpu")]
"""What the last exchange of a forward pass returned.  The next one takes it, so that the compiler
keeps their order, and leaves out or merges none of those that look alike to it."""
CAN_CUT_GRAPHS = hasattr(torch.Tag, "cudagraph_unsafe")
"""Whether this torch knows operators that CUDA graphs are cut at (2.9 on)."""
_CUTS: dict[str, Any] = {"tags": torch.Tag.cudagraph_unsafe} if CAN_CUT_GRAPHS else {}
"""Of an exchange: a replay would send once more what the first step sent."""
_VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
"""Part of the operators' names.  torch keeps compiled code on disk by these, with the rules below
built in, which another version of this file need not share."""


def register(caller: Caller) -> Tensor:
    """The number, 0-d, by which the operators find ``caller`` for as long as it lives.

    It is a tensor for the compiler to leave open: copies of a model are one graph.
    """
    number = next(_numbers)
    _CALLERS[number] = caller
    return torch.tensor(number, device="cpu")


def forget(uses: Iterable[int]) -> None:
    """End ``uses`` with the context that they belong to."""
    for number in uses:
        del _USES[number]


def normalise(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, caller: Tensor
) -> Tensor:
    """y = gamma (x - mean) r + beta, r = 1 / sqrt(variance + eps), with ``caller``'s statistics."""
    wide = x.to(statistics_dtype(x))
    others = [dim for dim in range(x.dim()) if dim != 1]
    own_variance, own_mean = torch.var_mean(wide, others, correction=0)
    count = x.numel() // x.size(1)
    after = _LAST[0]
    shared: tuple[Tensor, ...] = share_moments(own_mean, own_variance, after, eps, count, caller)
    mean, r, _LAST[0] = shared
    scale = r if gamma is None else r * gamma
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = (wide - mean.view(shape)) * scale.view(shape)
    y = y if beta is None else y + beta.view(shape)
    return y.to(x.dtype)


@torch.library.custom_op(f"fedtan_hpc::share_moments_{_VERSION}", mutates_args=(), **_CUTS)
def share_moments(
    mean_C: Tensor, variance_C: Tensor, after: Tensor, eps: float, count: int, caller: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Global mean and r, (C,), from this client's own moments of ``count`` values; one collective.

    Also returns the number of this use, which the next exchange takes as ``after``.
    """
    layer, number = _CALLERS[int(caller)], next(_numbers)
    call = layer.next_call()
    layer.uses.append(number)
    _USES[number] = call
    use = torch.tensor(number, device="cpu")  # where reading it waits for no device
    mean, variance = call.share_moments([count], mean_C.unsqueeze(0), variance_C.unsqueeze(0))
    return mean.clone().view(-1), (variance + eps).rsqrt_().view(-1), use


@share_moments.register_fake
def _(
    mean_C: Tensor, variance_C: Tensor, after: Tensor, eps: float, count: int, caller: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    use = torch.empty((), dtype=torch.int64, device="cpu")
    return torch.empty_like(mean_C), torch.empty_like(variance_C), use


@torch.library.custom_op(f"fedtan_hpc::share_derivatives_{_VERSION}", mutates_args=(), **_CUTS)
def _share_derivatives(sums_2C: Tensor, use: Tensor, count: int) -> Tensor:
    """s1 and s2 of ``shared_batch.py`` from this client's part of them; one collective."""
    call = _USES.get(int(use))
    if call is None:
        raise RuntimeError("a compiled step's backward pass belongs inside federated_statistics")
    sums = call.share_derivatives([count], sums_2C.unsqueeze(0))
    return sums.to(sums_2C.dtype, copy=True).view(-1)


@_share_derivatives.register_fake
def _(sums_2C: Tensor, use: Tensor, count: int) -> Tensor:
    return torch.empty_like(sums_2C)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    own_mean, _, _, _, ctx.count, _ = inputs
    ctx.save_for_backward(own_mean, *output)


def _differentiate(ctx: Any, by_mean: Tensor, by_r: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """The derivatives of the client's own moments, for its own chain rule to go on from.

    Own derivatives by the global mean and r are -r s1 and s2 / r, with the client's part of s1 and
    s2.  With mean = sum p m and variance = sum p (v + m^2) - mean^2, the sums over clients give
    -r (s1 + (m - mean) r s2) by m, and -r^2 s2 / 2 by v.
    """
    own_mean, mean, r, use = ctx.saved_tensors
    parts = torch.cat([-by_mean / r, by_r * r])
    s1, s2 = _share_derivatives(parts, use, ctx.count).chunk(2)
    slope = r * r * s2
    return -r * s1 - (own_mean - mean) * slope, -0.5 * slope, None, None, None, None


_register: Callable[..., None] = share_moments.register_autograd
_register(_differentiate, setup_context=_keep)
