"""What this rank has sent, and how far it has come.  No torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

EXCHANGED = 32768
"""Bytes of the largest message that ranks over gloo sum in one exchange.  With alpha seconds a step
and beta a byte, an exchange of n bytes takes alpha + (W - 1) n beta and a ring 2 (W - 1) alpha and
more: the exchange is the quicker for n < 2 alpha / beta, on any number of ranks.  With 100 µs that
is 25 kB at 1 Gbit/s, and 250 kB at 10."""


@dataclass
class CommCounters:
    """Collectives that training needs (statistics and model averages), counted on this rank."""

    messages: int = 0
    """Collective calls."""
    bytes: int = 0
    """Payload that this rank put into them, in bytes."""
    sums: int = 0
    payload: int = 0
    """The same two, counted in a single process too, which has nobody to send anything to."""
    statistics_seconds: float = 0.0
    average_seconds: float = 0.0
    """Time in those for statistics, and for models, gradients and private states."""

    def add_to_statistics(self, seconds: float) -> None:
        """Count time in a collective of statistics."""
        self.statistics_seconds += seconds

    def add_to_average(self, seconds: float) -> None:
        """Count time in a collective of models, gradients or private states."""
        self.average_seconds += seconds

    def since(self, earlier: CommCounters) -> CommCounters:
        """What was added after ``earlier`` was copied from this counter."""
        return CommCounters(
            self.messages - earlier.messages,
            self.bytes - earlier.bytes,
            self.sums - earlier.sums,
            self.payload - earlier.payload,
            self.statistics_seconds - earlier.statistics_seconds,
            self.average_seconds - earlier.average_seconds,
        )

    def copy(self) -> CommCounters:
        """The present count, which does not move on."""
        return replace(self)


@dataclass
class Progress:
    """How far this rank has come; for a watchdog that compares the ranks."""

    round: int = 0
    """In which it is; 0 before the first."""
    joined: int = 0
    """Collectives that it has begun: as many on every rank at the same place."""
    waiting_since: float | None = None
    """On ``time.monotonic``'s clock, if it is in a collective now."""


training_traffic = CommCounters()


progress = Progress()


@contextmanager
def waiting() -> Iterator[None]:
    """Mark this rank as waiting for others, for the watchdog."""
    progress.waiting_since = time.monotonic()
    try:
        yield
    finally:
        progress.waiting_since = None


@contextmanager
def joining() -> Iterator[None]:
    """Count a collective that this rank joins, and mark it as waiting."""
    progress.joined += 1
    with waiting():
        yield
