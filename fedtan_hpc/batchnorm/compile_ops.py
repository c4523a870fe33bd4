"""BN with global statistics as torch.compile sees it, for the training mode of ``layer``.

The arithmetic is ordinary operations, which the compiler fuses with those around them.  The
exchange of statistics is one custom operator forward and one backward; what happens inside,
collectives included, stays out of the graph.  A compiled step has no graph breaks, and its graph is
the same for every round and any backend.  Operators take tensors and numbers only, so a number
stands for each layer and for each of its calls.

Shapes: x and y (N, C) or (N, C, ...).
"""

import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .local_kernels import statistics_dtype
from .messages import Derivatives
from .statistics_call import LayerCall


class CompiledLayer(Protocol):
    """The interface of a layer that the operators use."""

    compiled_calls: list[int]
    """Numbers of the calls that the backward pass may still ask for."""

    def next_call(self) -> LayerCall:
        """Begins the next use of the layer."""


_LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_CALLS: dict[int, LayerCall] = {}
_numbers = itertools.count()
_last_call = [torch.zeros((), dtype=torch.int64, device="cpu")]
"""The number of the last forward exchange.  The next one takes it as an input, so that the compiler
keeps the order of the exchanges and neither drops nor merges equal ones."""
CAN_CUT_GRAPHS = hasattr(torch.Tag, "cudagraph_unsafe")
"""Whether this torch can cut CUDA graphs at an operator (2.9 and later)."""
_CUTS: dict[str, Any] = {"tags": torch.Tag.cudagraph_unsafe} if CAN_CUT_GRAPHS else {}
"""Keeps exchanges out of CUDA graphs: a replay would send the message of the first step again."""
_VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
"""Part of the operators' names.  torch stores compiled code on disk by these names, with the rules
below built in; another version of this file may have other rules."""


def register(layer: CompiledLayer) -> Tensor:
    """Returns the number of ``layer``, 0-d, by which the operators find it while it lives.

    It is a tensor, so that the compiler leaves its value open: copies of a model share one graph.
    """
    number = next(_numbers)
    _LAYERS[number] = layer
    return torch.tensor(number, device="cpu")


def checkpoints_traced() -> AbstractContextManager[Any]:
    """Lets the compiler trace layers under activation checkpointing.

    Without it torch refuses them, because an exchange notes its number in ``_last_call``.  A
    backward pass that runs a checkpointed layer again reads the number and notes none.
    """
    dynamo = sys.modules.get("torch._dynamo")  # torch.compile loads it, before the context
    option = "skip_fwd_side_effects_in_bwd_under_checkpoint"  # absent in older versions
    if dynamo is None or not hasattr(dynamo.config, option):
        return nullcontext()
    patch: AbstractContextManager[Any] = dynamo.config.patch({option: True})
    return patch


def forget(calls: Iterable[int]) -> None:
    """Drops calls when their context ends."""
    for number in calls:
        del _CALLS[number]


def normalise(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, layer_id: Tensor
) -> Tensor:
    """Returns y = gamma (x - mean) r + beta with global mean and r = 1 / sqrt(variance + eps)."""
    wide = x.to(statistics_dtype(x))
    others = [dim for dim in range(x.dim()) if dim != 1]
    local_variance, local_mean = torch.var_mean(wide, others, correction=0)
    count, last = x.numel() // x.size(1), _last_call[0]
    shared: tuple[Tensor, ...] = share_moments(
        local_mean, local_variance, last, eps, count, layer_id
    )
    mean, r, _last_call[0] = shared
    scale = r if gamma is None else r * gamma
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = (wide - mean.view(shape)) * scale.view(shape)
    y = y if beta is None else y + beta.view(shape)
    return y.to(x.dtype)


@torch.library.custom_op(f"fedtan_hpc::share_moments_{_VERSION}", mutates_args=(), **_CUTS)
def share_moments(
    mean_C: Tensor, variance_C: Tensor, last_call: Tensor, eps: float, count: int, layer_id: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns global mean and r, (C,), from this client's moments of ``count`` values per channel.

    Also returns the number of this call, which the next exchange takes as ``last_call``.
    """
    layer, number = _LAYERS[int(layer_id)], next(_numbers)
    call = layer.next_call()
    layer.compiled_calls.append(number)
    _CALLS[number] = call
    call_id = torch.tensor(number, device="cpu")  # reading it waits for no device
    mean, variance = call.share_moments([count], mean_C.unsqueeze(0), variance_C.unsqueeze(0))
    return mean.clone().view(-1), (variance + eps).rsqrt_().view(-1), call_id


@share_moments.register_fake
def _(
    mean_C: Tensor, variance_C: Tensor, last_call: Tensor, eps: float, count: int, layer_id: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    call_id = torch.empty((), dtype=torch.int64, device="cpu")
    return torch.empty_like(mean_C), torch.empty_like(variance_C), call_id


@torch.library.custom_op(f"fedtan_hpc::share_derivatives_{_VERSION}", mutates_args=(), **_CUTS)
def _share_derivatives(sums_2C: Tensor, call_id: Tensor, count: int) -> Tensor:
    """Returns r s1 and r s2 of ``global_kernels`` from this client's part of them."""
    call = _CALLS.get(int(call_id))
    if call is None:
        raise RuntimeError("a compiled step's backward pass belongs inside federated_statistics")
    first, second = sums_2C.unsqueeze(0).chunk(2, dim=1)
    sums = call.share_derivatives([count], Derivatives(first, second, factor=None))
    return sums.to(sums_2C.dtype, copy=True).view(-1)


@_share_derivatives.register_fake
def _(sums_2C: Tensor, call_id: Tensor, count: int) -> Tensor:
    return torch.empty_like(sums_2C)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    local_mean, _, _, _, ctx.count, _ = inputs
    ctx.save_for_backward(local_mean, *output)


def _backward(ctx: Any, by_mean: Tensor, by_r: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """Returns the derivatives by the client's moments m and v, for the rest of its chain rule.

    This client's derivatives by the global mean and r are -r s1 and s2 / r, with its part of s1 and
    s2.  With mean = sum p m and variance = sum p (v + m^2) - mean^2, the sums over all clients give
    -r s1 - (m - mean) r^2 s2 by m, and -r^2 s2 / 2 by v.
    """
    local_mean, mean, r, call_id = ctx.saved_tensors
    parts = torch.cat([-by_mean, by_r * r * r])
    first, second = _share_derivatives(parts, call_id, ctx.count).chunk(2)
    slope = r * second
    return -first - (local_mean - mean) * slope, -0.5 * slope, None, None, None, None


_register: Callable[..., None] = share_moments.register_autograd
_register(_backward, setup_context=_setup_context)
