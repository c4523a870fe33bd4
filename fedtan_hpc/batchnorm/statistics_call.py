"""One synchronised forward and backward pass: with whom, with which weight, at which layer.

A ``GlobalStatistics`` lives as long as a ``federated_statistics`` context.  It numbers the layers' calls,
sends their messages and reads what comes back.  On a CPU every message is checked at once; on an
accelerator, where looking at a value waits for the device, when the context ends.

Shapes: K clients that this rank runs stacked (1 unless it stacks), N samples, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..distributed import collectives, process_group
from . import messages
from .local_kernels import RunningBuffers
from .lockstep import Lockstep
from .messages import ClientWeights

Update = Callable[[Tensor, Tensor], None]
"""Moves a layer's running statistics towards a mean and an unbiased variance, (C,) or (K, C)."""


_CALLS = 256


class LayerCall(Protocol):
    """One use of one layer: what the arithmetic asks of it."""

    @property
    def mask_KN(self) -> Tensor | None:
        """Which samples of a padded stack are real; None if all are."""

    @property
    def sizes(self) -> Sequence[int]:
        """Real samples of each client of a padded stack."""

    @property
    def own(self) -> Callable[[], RunningBuffers] | None:
        """Begins a batch of stacked clients that each normalise by their own, without padding."""

    def share_moments(
        self, counts: Sequence[int], mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The clients' own moments in, those to normalise by out, (C,) or (K, C); one dtype."""

    def share_derivatives(self, counts: Sequence[int], sums_K2C: Tensor) -> Tensor:
        """The clients' own two sums per channel in, those to use out: (2C,) or (K, 2C)."""


class BatchNormContext(Protocol):
    """What a layer finds in itself while it is not ordinary local BN."""

    @property
    def is_stacked(self) -> bool:
        """Whether layers run under ``torch.func.vmap``, with all clients of a stack at once."""

    def call(self, index: int, update: Update) -> LayerCall:
        """The next use of layer ``index``, whose own statistics ``update`` moves."""


@dataclass(frozen=True)
class GlobalStatisticsCall:
    """A use with global statistics; ``number`` is the same on all ranks of the same network."""

    federation: GlobalStatistics
    layer: str
    number: int
    update: Update
    mask_KN: Tensor | None
    sizes: Sequence[int]
    own = None

    def share_moments(
        self, counts: Sequence[int], mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One collective: the clients' moments in, the global ones out, (C,) each.

        Moves the running statistics too: this is the one place that all ways of running a layer
        pass exactly once, outside of any tracing.
        """
        tag, shares = 2 * self.number, self.federation.shares(counts)
        message = messages.pack_moments(tag, shares, mean_KC, variance_KC)
        message = self._send(message, tag, messages.check_moments)
        moments = messages.unpack_moments(message, mean_KC.size(-1))
        mean_C, variance_C = (v.to(mean_KC.dtype) for v in (moments.mean_C, moments.variance_C))
        n = moments.count
        self.update(mean_C, variance_C * (n / (n - 1)))
        return mean_C, variance_C

    def share_derivatives(self, counts: Sequence[int], sums_K2C: Tensor) -> Tensor:
        """One collective: the clients' two sums per channel in, sum_k p_k sums_k out; float64."""
        tag, shares = 2 * self.number + 1, self.federation.shares(counts)
        message = messages.pack_derivatives(tag, shares, sums_K2C)
        return messages.unpack_derivatives(self._send(message, tag, messages.check_derivatives))

    def _send(self, message: Tensor, tag: int, check: Callable[[Tensor, int, int], None]) -> Tensor:
        message = self.federation.sum(message)

        def verify(header: Tensor) -> None:
            try:
                check(header, tag, process_group.world_size(self.federation.group))
            except (ValueError, RuntimeError) as error:
                raise type(error)(f"layer {self.layer}: {error}") from None

        self.federation.verify_soon(message[: messages.HEADER], verify)
        return message


@dataclass
class GlobalStatistics:
    """The clients that normalise together: this rank's weights p_k and the group of ranks."""

    weights: Sequence[float]
    group: process_group.Group
    layers: Sequence[str]
    """Names of the module's BN layers, in the module's order."""
    lockstep: Lockstep[Tensor] | None = None
    """Where this client meets the rank's other ones, if they run in lock-step."""
    mask_KN: Tensor | None = None
    """Which samples of a padded stack are real; None if all are."""
    sizes: Sequence[int] = ()
    """Real samples of each client of a padded stack."""
    updates: Sequence[Update] | None = None
    """By layer, in place of the layers' own: a stack keeps running statistics for each client."""
    is_stacked: bool = False
    is_open: bool = True
    _calls: list[int] = field(default_factory=list)
    _unverified: list[tuple[Tensor, Callable[[Tensor], None]]] = field(default_factory=list)
    _shares: dict[tuple[int, ...], ClientWeights] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._calls = [0] * len(self.layers)

    def sum(self, message: Tensor) -> Tensor:
        """The sum over the clients of this rank and of all ranks; one collective."""
        if self.lockstep is None:
            return collectives.sum_for_training(message, self.group)
        return self.lockstep.exchange(message)

    def shares(self, counts: Sequence[int]) -> ClientWeights:
        """What the clients contribute with so many values per channel each."""
        key = tuple(counts)
        if key not in self._shares:
            self._shares[key] = ClientWeights(self.weights, key)
        return self._shares[key]

    def call(self, index: int, update: Update) -> LayerCall:
        """The next call of layer ``index``.

        Calls are counted round to keep numbers small: the sum of their squares must be exact.
        """
        self._calls[index] = (self._calls[index] + 1) % _CALLS
        number = self._calls[index] * len(self.layers) + index
        mine = update if self.updates is None else self.updates[index]
        return GlobalStatisticsCall(
            self, self.layers[index], number, mine, self.mask_KN, self.sizes
        )

    def verify_soon(self, header: Tensor, verify: Callable[[Tensor], None]) -> None:
        """Run ``verify`` at once, or with all others when the context ends: a GPU is waited for."""
        self._unverified.append((header, verify))
        if header.device.type == "cpu" or not self.is_open or len(self._unverified) > _CALLS:
            self._verify()

    def close(self) -> None:
        """End the context; raises what the checks put off until now have found."""
        self.is_open = False
        self._verify()

    def _verify(self) -> None:
        """All headers are read at once."""
        unverified, self._unverified = self._unverified, []
        if len(unverified) > 1:
            headers = collectives.to_cpu(torch.cat([header for header, _ in unverified]))
            sizes = [len(header) for header, _ in unverified]
            read = headers.split(sizes)
        else:
            read = tuple(collectives.to_cpu(header) for header, _ in unverified)
        for header, (_, verify) in zip(read, unverified, strict=True):
            verify(header)
