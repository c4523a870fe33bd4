"""Local steps of a stack: its clients side by side, each with statistics of its own.

Shapes: K clients, N samples of the largest batch, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..runtime.transfer import constant
from .layer import FedTANBatchNorm
from .local_kernels import RunningBuffers
from .statistics_call import LayerCall, Update


class RunningStatistics:
    """A layer's running mean and variance for each client of a stack, (K, C)."""

    def __init__(self, layer: FedTANBatchNorm, clients: int) -> None:
        self.momentum = layer.momentum
        self._buffers: list[Tensor] = []
        self._counts = torch.zeros(clients, dtype=torch.int64)
        """Batches that each client's statistics have seen."""
        if layer.running_mean is not None and layer.running_var is not None:
            assert layer.num_batches_tracked is not None
            both = (layer.running_mean, layer.running_var)
            self._buffers = [value.expand(clients, -1).clone() for value in both]
            self._counts = layer.num_batches_tracked.repeat(clients)

    def move(self, mean: Tensor, variance: Tensor, lanes: slice = slice(None)) -> None:
        """Towards the given moments, (C,) for all clients or (K, C) for those of ``lanes``."""
        self._counts[lanes] += 1
        for buffer, now in zip(self._buffers, (mean, variance), strict=False):
            part, target = buffer[lanes], now.to(buffer.dtype).expand_as(buffer[lanes])
            if self.momentum is not None:
                part.lerp_(target, self.momentum)
            else:  # torch's cumulative average
                share_K1 = self._counts[lanes].to(part).reciprocal().unsqueeze(1)
                part.lerp_(target, share_K1.expand_as(part))

    def begin(self, lanes: slice) -> RunningBuffers:
        """Count a batch of ``lanes``, whose statistics torch's kernels are to move."""
        assert self.momentum is not None, "torch's kernels know no cumulative average"
        self._counts[lanes] += 1
        mean, variance = [buffer[lanes].view(-1) for buffer in self._buffers] or (None, None)
        return RunningBuffers(mean, variance, self.momentum)

    def copy_from(self, layer: FedTANBatchNorm, client_index: int) -> None:
        """Let one client begin with the statistics of ``layer``."""
        if self._buffers:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            assert layer.num_batches_tracked is not None
            self._buffers[0][client_index] = layer.running_mean
            self._buffers[1][client_index] = layer.running_var
            self._counts[client_index] = layer.num_batches_tracked

    def copy_to(self, layer: FedTANBatchNorm, client_index: int) -> None:
        """The statistics of one client, and the batches that all have seen."""
        if self._buffers:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            assert layer.num_batches_tracked is not None
            layer.running_mean.copy_(self._buffers[0][client_index])
            layer.running_var.copy_(self._buffers[1][client_index])
            layer.num_batches_tracked.copy_(self._counts[client_index])


@dataclass(frozen=True)
class LocalStatistics:
    """The context of a local step: every client of a part of the stack by itself."""

    running: Sequence[RunningStatistics]
    lanes: slice
    mask_KN: Tensor | None
    sizes: Sequence[int]
    is_stacked = True

    def call(self, index: int, update: Update) -> LayerCall:
        """A use of a layer; the stack's running statistics move, not the layer's own."""
        running = self.running[index]
        whole = self.mask_KN is None and running.momentum is not None
        own = partial(running.begin, self.lanes) if whole else None
        return LocalCall(running, self.lanes, self.mask_KN, self.sizes, own)


@dataclass(frozen=True)
class LocalCall:
    """A use of a layer by clients of a stack, each with the statistics of its own batch."""

    running: RunningStatistics
    lanes: slice
    mask_KN: Tensor | None
    sizes: Sequence[int]
    own: Callable[[], RunningBuffers] | None
    """None of padded batches and of cumulative averages, which torch's kernels do not know."""

    def share_moments(
        self, counts: Sequence[int], mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What came in."""
        if min(counts) < 2:
            raise ValueError("one value per channel in a client's batch; a variance needs two")
        n_K1 = constant(tuple(counts), mean_KC.dtype, mean_KC.device).unsqueeze(1)
        self.running.move(mean_KC, variance_KC * (n_K1 / (n_K1 - 1)), self.lanes)
        return mean_KC, variance_KC

    def share_derivatives(self, counts: Sequence[int], sums_K2C: Tensor) -> Tensor:
        """What came in, in float64."""
        return sums_K2C.double()
