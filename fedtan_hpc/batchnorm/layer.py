"""The BN layer whose statistics can be global; ``conversion`` makes it from torch's layers.

``context`` binds layers to a ``BatchNormContext``; ``running_norm`` derives FBN and HBN from it.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from . import compile_ops
from .global_kernels import Normalise
from .local_kernels import AlignedGradient, needs_aligned_gradient, statistics_dtype
from .statistics_call import BatchNormContext, LayerCall, Moments
from .vmap_autograd import StackedNormalise

_BACKWARD_OUTSIDE = (
    "activation checkpointing runs a BN layer again outside of federated_statistics, where it had "
    "global statistics: the backward pass belongs inside the context too"
)


class Tracked(NamedTuple):
    """The running statistics of a layer at one use; each may be absent, as in torch."""

    mean: Tensor | None
    variance: Tensor | None
    counter: Tensor | None
    """Number of batches seen, 0-d."""
    momentum: float | None
    """None for torch's cumulative average."""

    def buffers(self) -> list[Tensor]:
        """Returns those that are present."""
        return [value for value in self[:3] if value is not None]

    def factor(self) -> float | None:
        """Returns how far mean and variance move, after the counter has moved."""
        if self.momentum is None and self.counter is not None:
            return 1.0 / float(self.counter)
        return self.momentum


class FedTANBatchNorm(_BatchNorm):
    """Batch normalization of (N, C) or (N, C, ...) that is local, or global inside a context.

    Inside ``federated_statistics``, in training mode, mean and variance are those of all clients,
    forward and backward (FedTAN, arXiv 2301.02982).  Otherwise it is ``torch.nn.BatchNorm``.  A
    converted layer also is an instance of its former class, such as ``torch.nn.BatchNorm2d``.
    """

    former_class: ClassVar[type[_BatchNorm] | None] = None
    """The class before conversion; None for a layer that was not converted."""
    is_frozen = False
    """Whether the layer stays in evaluation mode while the rest of its network trains."""
    _then: Callable[[Tensor], Tensor] | None = None
    """What the former class does to the normalised values, such as an activation."""
    _model_number = 0
    """The place of the layer's model among all models that this process has converted, from 1."""
    _context: BatchNormContext | None = None
    _has_context = False
    """Whether there is a context: torch.compile would compile anew for each type of context."""
    _ran_without_grad = False
    """Whether the last use in a context recorded nothing, as reentrant checkpointing does."""
    _index = 0
    """Number of the layer in its context."""
    _layer_id: Tensor | None = None
    """The layer's number in ``compile_ops``."""
    compiled_calls: list[int]
    """Numbers of this context's calls by compiled steps."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises per channel; returns the shape, dtype and memory format of ``x``."""
        y = self.normalise(x)
        return y if self._then is None else self._then(y)

    def normalise(self, x: Tensor) -> Tensor:
        """Returns ``forward`` without what the former class adds to BN."""
        if not self._has_context:
            return self._normalise_locally(x)
        return self._train_in_context(x) if self.training else self._evaluate_in_context(x)

    def _normalise_locally(self, x: Tensor) -> Tensor:
        if self._ran_without_grad and self.training:
            if torch._C._current_graph_task_id() != -1:  # a backward pass runs the layer again
                raise RuntimeError(_BACKWARD_OUTSIDE)
            self._ran_without_grad = False
        y = _BatchNorm.forward(self, x)
        if self.training and needs_aligned_gradient(x):
            y = AlignedGradient.apply(y)  # type: ignore[no-untyped-call]
        return y

    def _evaluate_in_context(self, x: Tensor) -> Tensor:
        assert self._context is not None
        if not self._context.is_stacked:
            if not torch.compiler.is_compiling():  # there the moments come while the graph runs
                self._context.move_running_statistics()
            return self._normalise_locally(x)
        wide = x.to(statistics_dtype(x))  # torch's rule for vmap takes one dtype only
        return self._normalise_locally(wide).to(x.dtype)

    def _train_in_context(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        self._check_tensors(x)
        if torch.compiler.is_compiling():
            assert self._layer_id is not None
            y: Tensor = compile_ops.normalise(x, self.weight, self.bias, self.eps, self._layer_id)
            return y
        assert self._context is not None
        self._ran_without_grad = not torch.is_grad_enabled()
        arguments = x, self.weight, self.bias, self.eps, self.next_call()
        if self._context.is_stacked:
            y, *_ = StackedNormalise.apply(*arguments)  # type: ignore[no-untyped-call]
            return y
        return Normalise.apply(*arguments)  # type: ignore[no-untyped-call, no-any-return]

    def next_call(self) -> LayerCall:
        """Begins the next use of the layer in its context."""
        assert self._context is not None
        return self._context.call(self._index, self._tracked())

    def _tracked(self) -> Tracked | None:
        """Returns the running statistics as they are now; None if the layer does not track."""
        if not self.track_running_stats:
            return None
        buffers = self.running_mean, self.running_var, self.num_batches_tracked
        return Tracked(*buffers, self.momentum)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without the context: copies and pickles do not belong to it."""
        state = self.__dict__.copy()
        for name in ("_context", "_layer_id", "compiled_calls"):
            state.pop(name, None)
        return {**state, "_has_context": False}

    def _check_input_dim(self, input: Tensor) -> None:
        if self.former_class is not None:
            self.former_class._check_input_dim(self, input)
        elif input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        has_width = self.weight is not None or self.running_mean is not None
        if has_width and input.size(1) != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got {tuple(input.shape)}")

    def _check_tensors(self, x: Tensor) -> None:
        """Raises ``RuntimeError`` and ``ValueError`` where torch's BN does."""
        if (self.running_mean is None) != (self.running_var is None):
            raise ValueError("running_mean and running_var must both be None or neither be None")
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(self, name)
            if value is not None and value.dtype not in (x.dtype, statistics_dtype(x)):
                raise RuntimeError(
                    f"the input of a BN layer is {x.dtype} and its {name} is {value.dtype}: use "
                    "one dtype, or half precision inputs with float32 layers"
                )


@torch.no_grad()
def move_running_statistics(moved: Sequence[Moments]) -> None:
    """Moves running statistics towards global moments; same bits on every rank.

    The owners are ``Tracked``.  All move together, in few operations; the uses of one layer, and of
    layers that share a buffer, follow each other.
    """
    while moved:
        now, later, seen = list[Moments](), list[Moments](), set[int]()
        for each in moved:
            numbers = {id(buffer) for buffer in each.owner.buffers()}
            (later if numbers & seen else now).append(each)
            seen |= numbers
        for device in {each.mean.device for each in now}:
            _move([each for each in now if each.mean.device == device])
        moved = later


def _move(moved: Sequence[Moments]) -> None:
    counters = [each.owner.counter for each in moved if each.owner.counter is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    groups: dict[tuple[float, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for each, variance in zip(moved, _unbiased_variances(moved), strict=True):
        owner, factor = each.owner, each.owner.factor()
        for buffer, target in ((owner.mean, each.mean), (owner.variance, variance)):
            if buffer is not None and factor:
                buffers, targets = groups.setdefault((factor, buffer.dtype), ([], []))
                buffers.append(buffer)
                targets.append(target.to(buffer.dtype))
    for (factor, _), (buffers, targets) in groups.items():
        torch._foreach_lerp_(buffers, targets, factor)


def _unbiased_variances(moved: Sequence[Moments]) -> Sequence[Tensor]:
    """Returns the variances times n / (n - 1); n are numbers on a CPU, and tensors on a GPU."""
    counts, variances = [each.count for each in moved], [each.variance for each in moved]
    if isinstance(counts[0], Tensor):
        n_L = torch.stack(counts)
        return torch._foreach_mul(variances, list((n_L / (n_L - 1)).unbind()))
    return torch._foreach_mul(variances, [n / (n - 1) for n in counts])
