"""The BN layer whose statistics can be global, and the two calls that put it to use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import compile_ops
from .autograd import Normalise, StackedNormalise
from .moments import statistics_dtype
from .statistics_call import BatchNormContext, LayerCall

CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""BN layers that can be converted without losing any of their behaviour."""


class FedTANBatchNorm(_BatchNorm):
    """Batch normalization of (N, C) or (N, C, ...) that is local, or global inside a context.

    Inside ``federated_statistics``, in training mode, mean and variance are those of all clients,
    forward and backward (FedTAN, arXiv 2301.02982).  Otherwise it is ``torch.nn.BatchNorm``.
    """

    _kind: type[_BatchNorm] = nn.SyncBatchNorm
    """What the layer was before conversion: it says which inputs it takes."""
    _context: BatchNormContext | None = None
    _has_context = False
    """The same as a truth value: compiled code is made anew for every type that it looks at."""
    _index = 0
    _number: Tensor | None = None
    """By which the operators of compiled steps find the layer."""
    uses: list[int]
    """Numbers of those in the context that were compiled."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise per channel; returns the shape, dtype and memory format of ``x``."""
        if not self._has_context:
            return super().forward(x)
        if not self.training:
            return self._frozen_in_context(x)
        return self._forward_in_context(x)

    def _frozen_in_context(self, x: Tensor) -> Tensor:
        assert self._context is not None
        if not self._context.is_stacked:
            return super().forward(x)
        wide = x.to(statistics_dtype(x))  # vmap's rule takes one dtype only
        return super().forward(wide).to(x.dtype)

    def _forward_in_context(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if torch.compiler.is_compiling():
            assert self._number is not None
            y: Tensor = compile_ops.normalise(x, self.weight, self.bias, self.eps, self._number)
            return y
        assert self._context is not None
        arguments = x, self.weight, self.bias, self.eps, self.next_call()
        if self._context.is_stacked:
            y, *_ = StackedNormalise.apply(*arguments)  # type: ignore[no-untyped-call]
            return y
        return Normalise.apply(*arguments)  # type: ignore[no-untyped-call, no-any-return]

    def next_call(self) -> LayerCall:
        """Begin the next use of the layer in its context."""
        assert self._context is not None
        return self._context.call(self._index, self._update_running_statistics)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles made inside a context do not belong to it."""
        state = self.__dict__.copy()
        for name in ("_context", "_number", "uses"):
            state.pop(name, None)
        return {**state, "_has_context": False}

    def _update_running_statistics(self, mean_C: Tensor, variance_C: Tensor) -> None:
        """Move towards the global mean and unbiased variance, the same bits on every rank.

        No gradient is recorded where this is called: inside of the layer's own function.
        """
        if self.running_mean is None or self.running_var is None:
            return
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if share is None:  # torch's cumulative average
                share = 1.0 / float(self.num_batches_tracked)
        if share is None:
            raise ValueError("momentum=None needs num_batches_tracked")
        for running, now in ((self.running_mean, mean_C), (self.running_var, variance_C)):
            running.lerp_(now.to(running.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        self._kind._check_input_dim(self, input)
        if input.size(1) != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got {tuple(input.shape)}")


def convert_batchnorm(module: nn.Module) -> nn.Module:
    """Turn every BatchNorm1d/2d/3d and SyncBatchNorm in ``module`` into a ``FedTANBatchNorm``.

    The layers stay the same objects, with their parameters, buffers, hooks and settings, so that
    state_dict keys, optimizers and every reference to a layer stay valid.  ``module`` itself is
    returned.

    Raises ``ValueError``, and changes nothing, if there is another kind of BN (lazy, quantised, a
    subclass of one's own, TorchScript), whose behaviour the conversion would lose.
    """
    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise ValueError(f"{name or 'the module'} is TorchScript: convert it before scripting")
        if isinstance(layer, _BatchNorm) and not isinstance(layer, FedTANBatchNorm):
            if type(layer) not in CONVERTIBLE:
                kinds = ", ".join(kind.__name__ for kind in CONVERTIBLE)
                raise ValueError(
                    f"layer {name or '(root)'} is a {type(layer).__name__}, and only {kinds} can "
                    "be converted; run one batch through lazy layers first"
                )
            found.append(layer)
    for layer in found:
        layer.__dict__["_kind"] = type(layer)
        layer.__dict__["_has_context"] = False
        layer.__class__ = FedTANBatchNorm
    return module


def batchnorm_layers(module: nn.Module) -> dict[str, FedTANBatchNorm]:
    """The module's FedTAN layers by name; an unconverted BN layer is an error."""
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, FedTANBatchNorm):
            found[name or "(root)"] = layer
        elif isinstance(layer, _BatchNorm):
            raise ValueError(f"layer {name or '(root)'} is local BN: call convert_batchnorm first")
    return found
