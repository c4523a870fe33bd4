"""Local steps of stacked clients: each client has the statistics of its batch.

``training.stacked`` uses what has no underscore, in the stack of a rank.

Shapes: K clients, N samples of the largest batch, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..runtime.transfer import constant
from .layer import FedTANBatchNorm
from .local_kernels import RunningBuffers
from .messages import Derivatives
from .statistics_call import GlobalStatistics, LayerCall, Moments

_ALL = slice(None)


class RunningStatistics:
    """A layer's running mean and variance for each client of a stack, (K, C)."""

    def __init__(self, layer: FedTANBatchNorm, clients: int) -> None:
        self.momentum = layer.momentum
        self._buffers = [value.expand(clients, -1).clone() for value in _buffers(layer)]
        self._counts_K = torch.zeros(clients, dtype=torch.int64)
        """Batches that each client's statistics have seen."""
        if self._buffers:
            assert layer.num_batches_tracked is not None
            self._counts_K = layer.num_batches_tracked.repeat(clients)

    def move(self, mean: Tensor, variance: Tensor, clients: slice = _ALL) -> None:
        """Moves towards the given moments, (C,) for all clients or (K, C) for those selected."""
        self._counts_K[clients] += 1
        for buffer, moment in zip(self._buffers, (mean, variance), strict=False):
            rows = buffer[clients]
            target = moment.to(buffer.dtype).expand_as(rows)
            if self.momentum is not None:
                rows.lerp_(target, self.momentum)
            else:  # torch's cumulative average
                factor_K1 = self._counts_K[clients].to(rows).reciprocal().unsqueeze(1)
                rows.lerp_(target, factor_K1.expand_as(rows))

    def begin_batch(self, clients: slice) -> RunningBuffers:
        """Counts a batch; returns the selected clients' buffers, which torch's kernels move."""
        assert self.momentum is not None, "torch's kernels know no cumulative average"
        self._counts_K[clients] += 1
        mean, variance = [buffer[clients].view(-1) for buffer in self._buffers] or (None, None)
        return RunningBuffers(mean, variance, self.momentum)

    def copy_from(self, layer: FedTANBatchNorm, client_index: int) -> None:
        """Gives one client the statistics of ``layer``."""
        for buffer, value in zip(self._buffers, _buffers(layer), strict=True):
            buffer[client_index] = value
        if layer.num_batches_tracked is not None:
            self._counts_K[client_index] = layer.num_batches_tracked

    def copy_to(self, layer: FedTANBatchNorm, client_index: int) -> None:
        """Gives ``layer`` the statistics of one client."""
        for buffer, value in zip(self._buffers, _buffers(layer), strict=True):
            value.copy_(buffer[client_index])
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.copy_(self._counts_K[client_index])


def move_stacks(moved: Sequence[Moments]) -> None:
    """Moves the running statistics of stacks towards global moments."""
    for running, mean_C, variance_C, n in moved:
        running.move(mean_C, variance_C * (n / (n - 1)))


def _buffers(layer: FedTANBatchNorm) -> list[Tensor]:
    """Returns the running mean and variance of ``layer``; none if it does not track them."""
    values = layer.running_mean, layer.running_var
    return [value for value in values if value is not None]


@dataclass(frozen=True)
class LocalStatistics:
    """The context of a local step by some of the stack's clients."""

    running: Sequence[RunningStatistics]
    """By layer, for the whole stack."""
    clients: slice
    """Which clients of the stack take the step."""
    mask_KN: Tensor | None
    sizes: Sequence[int]
    is_stacked = True

    def call(self, index: int, owner: Any) -> LayerCall:
        """Begins a use of layer ``index``; the stack's running statistics move, not ``owner``'s."""
        running = self.running[index]
        by_torch = self.mask_KN is None and running.momentum is not None
        begin = partial(running.begin_batch, self.clients) if by_torch else None
        return _LocalCall(running, self.clients, self.mask_KN, self.sizes, begin)

    def move_running_statistics(self) -> None:
        """Does nothing: running statistics move in each use of a layer."""


class PartlyGlobal:
    """The context of a step by all clients of a stack with global statistics in some layers."""

    is_stacked = True

    def __init__(
        self,
        shared: GlobalStatistics,
        own: LocalStatistics,
        layers: Sequence[str],
        chosen: Sequence[str],
    ) -> None:
        """``shared`` serves the ``chosen`` ones of all ``layers``, in order, ``own`` the others."""
        self._shared, self._own = shared, own
        self._places = {layers.index(name): place for place, name in enumerate(chosen)}

    def call(self, index: int, owner: Any) -> LayerCall:
        """Begins a use of layer ``index``."""
        if index in self._places:
            return self._shared.call(self._places[index], owner)
        return self._own.call(index, owner)

    def move_running_statistics(self) -> None:
        """Moves those of layers with global statistics; the others move in each use."""
        self._shared.move_running_statistics()


@dataclass(frozen=True)
class _LocalCall:
    """A use of a layer by clients of a stack, each with the statistics of its batch."""

    running: RunningStatistics
    clients: slice
    mask_KN: Tensor | None
    sizes: Sequence[int]
    local_buffers: Callable[[], RunningBuffers] | None
    """None for padded batches and cumulative averages, which torch's kernels do not know."""

    def share_moments(
        self, counts: Sequence[int], mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the clients' moments as they are; moves the running statistics."""
        if min(counts) < 2:
            raise ValueError("one value per channel in a client's batch; a variance needs two")
        n_K1 = constant(tuple(counts), mean_KC.dtype, mean_KC.device).unsqueeze(1)
        self.running.move(mean_KC, variance_KC * (n_K1 / (n_K1 - 1)), self.clients)
        return mean_KC, variance_KC

    def share_derivatives(self, counts: Sequence[int], sums: Derivatives) -> Tensor:
        """Returns each client's sums, multiplied by the factor, (K, 2C) in float64."""
        return sums.scaled()
