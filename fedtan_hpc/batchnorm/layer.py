"""The BN layer whose statistics can be global, and the conversion of a network's BN layers.

``context`` binds layers to a ``BatchNormContext``; ``models`` and ``training`` use the two
functions at the end.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import compile_ops
from .global_kernels import Normalise
from .moments import statistics_dtype
from .statistics_call import BatchNormContext, LayerCall
from .vmap_autograd import StackedNormalise

CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""BN layers that can be converted without losing any of their behaviour."""


class FedTANBatchNorm(_BatchNorm):
    """Batch normalization of (N, C) or (N, C, ...) that is local, or global inside a context.

    Inside ``federated_statistics``, in training mode, mean and variance are those of all clients,
    forward and backward (FedTAN, arXiv 2301.02982).  Otherwise it is ``torch.nn.BatchNorm``.
    """

    _original_class: type[_BatchNorm] = nn.SyncBatchNorm
    """The class before conversion, which says what inputs the layer takes."""
    _context: BatchNormContext | None = None
    _has_context = False
    """Whether there is a context: torch.compile would compile anew for each type of context."""
    _index = 0
    """Number of the layer in its context."""
    _layer_id: Tensor | None = None
    """The layer's number in ``compile_ops``."""
    compiled_calls: list[int]
    """Numbers of this context's calls by compiled steps."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises per channel; returns the shape, dtype and memory format of ``x``."""
        if not self._has_context:
            return super().forward(x)
        if not self.training:
            return self._evaluate_in_context(x)
        return self._train_in_context(x)

    def _evaluate_in_context(self, x: Tensor) -> Tensor:
        assert self._context is not None
        if not self._context.is_stacked:
            return super().forward(x)
        wide = x.to(statistics_dtype(x))  # torch's rule for vmap takes one dtype only
        return super().forward(wide).to(x.dtype)

    def _train_in_context(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if torch.compiler.is_compiling():
            assert self._layer_id is not None
            y: Tensor = compile_ops.normalise(x, self.weight, self.bias, self.eps, self._layer_id)
            return y
        assert self._context is not None
        arguments = x, self.weight, self.bias, self.eps, self.next_call()
        if self._context.is_stacked:
            y, *_ = StackedNormalise.apply(*arguments)  # type: ignore[no-untyped-call]
            return y
        return Normalise.apply(*arguments)  # type: ignore[no-untyped-call, no-any-return]

    def next_call(self) -> LayerCall:
        """Begins the next use of the layer in its context."""
        assert self._context is not None
        return self._context.call(self._index, self._update_running_statistics)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without the context: copies and pickles do not belong to it."""
        state = self.__dict__.copy()
        for name in ("_context", "_layer_id", "compiled_calls"):
            state.pop(name, None)
        return {**state, "_has_context": False}

    def _update_running_statistics(self, mean_C: Tensor, variance_C: Tensor) -> None:
        """Moves the buffers towards a mean and an unbiased variance; same bits on every rank.

        The callers are custom autograd functions and operators, which record no gradient.
        """
        if self.running_mean is None or self.running_var is None:
            return
        factor = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if factor is None:  # torch's cumulative average
                factor = 1.0 / float(self.num_batches_tracked)
        if factor is None:
            raise ValueError("momentum=None needs num_batches_tracked")
        for buffer, target in ((self.running_mean, mean_C), (self.running_var, variance_C)):
            buffer.lerp_(target.to(buffer.dtype), factor)

    def _check_input_dim(self, input: Tensor) -> None:
        self._original_class._check_input_dim(self, input)
        if input.size(1) != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got {tuple(input.shape)}")


def convert_batchnorm(module: nn.Module) -> nn.Module:
    """Turns every BatchNorm1d/2d/3d and SyncBatchNorm in ``module`` into a ``FedTANBatchNorm``.

    Returns ``module``.  Its layers stay the same objects, with their parameters, buffers, hooks and
    settings, so that state_dict keys, optimizers and every reference to a layer stay valid.

    Raises ``ValueError``, and changes nothing, if ``module`` has another kind of BN layer (lazy,
    quantised, a user's subclass, TorchScript), whose behaviour the conversion would lose.
    """
    layers = []
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
            layers.append(layer)
    for layer in layers:
        layer.__dict__["_original_class"] = type(layer)
        layer.__dict__["_has_context"] = False
        layer.__class__ = FedTANBatchNorm
    return module


def batchnorm_layers(module: nn.Module) -> dict[str, FedTANBatchNorm]:
    """Returns the FedTAN layers by name; raises ``ValueError`` for an unconverted BN layer."""
    layers = {}
    for name, layer in module.named_modules():
        if isinstance(layer, FedTANBatchNorm):
            layers[name or "(root)"] = layer
        elif isinstance(layer, _BatchNorm):
            raise ValueError(f"layer {name or '(root)'} is local BN: call convert_batchnorm first")
    return layers
