"""What this rank has sent, and how far it has come.  No torch.

``collectives`` counts; the trainer records the traffic of a round, the watchdog compares progress.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

MAX_EXCHANGE_BYTES = 32768
"""Largest message in bytes that ranks over gloo sum in one all-to-all exchange.

With a latency of alpha seconds and beta seconds a byte, an exchange of n bytes between W ranks
takes alpha + (W - 1) n beta, and a ring 2 (W - 1) alpha or more.  The exchange is faster for
n < 2 alpha / beta: with alpha = 100 µs below 25 kB at 1 Gbit/s, and below 250 kB at 10 Gbit/s."""


@dataclass
class CommCounters:
    """This rank's collectives for training: statistics, models, gradients and private states."""

    messages: int = 0
    """Collective calls; 0 in a single process."""
    bytes: int = 0
    """Bytes that this rank put into these calls."""
    payload_messages: int = 0
    """Calls without those that only move private states; a single process counts them too."""
    payload_bytes: int = 0
    """Bytes of the calls in ``payload_messages``."""
    statistics_seconds: float = 0.0
    """Time in collectives of BN statistics."""
    average_seconds: float = 0.0
    """Time in collectives of models, gradients and private states."""
    client_messages: int = 0
    """Calls between the ranks that hold one client, which the other counters leave out."""
    client_bytes: int = 0
    """Bytes of the calls in ``client_messages``."""
    client_seconds: float = 0.0
    """Time in these calls."""

    def add_client_seconds(self, seconds: float) -> None:
        """Adds the time of a collective between the ranks of one client."""
        self.client_seconds += seconds

    def add_seconds(self, of_models: bool, seconds: float) -> None:
        """Adds the time of a collective of models, gradients and states, or of statistics."""
        if of_models:
            self.average_seconds += seconds
        else:
            self.statistics_seconds += seconds

    def since(self, earlier: CommCounters) -> CommCounters:
        """Returns what was counted after ``earlier`` was copied from this counter."""
        names = [field.name for field in fields(self)]
        return CommCounters(
            **{name: getattr(self, name) - getattr(earlier, name) for name in names}
        )

    def copy(self) -> CommCounters:
        """Returns a snapshot, which later collectives do not change."""
        return replace(self)


@dataclass
class Progress:
    """How far this rank has come; the watchdog compares it between ranks."""

    round: int = 0
    """Number of the current round; 0 before the first."""
    collectives: int = 0
    """Collectives of all ranks that it has begun; equal on all at one point of the program."""
    client_collectives: int = 0
    """Collectives that it has begun with the other ranks of its client."""
    client: int | None = None
    """The client whose local steps this rank takes."""
    waiting_since: float | None = None
    """Time on ``time.monotonic``'s clock since which this rank waits for others, or None."""


training_traffic = CommCounters()
progress = Progress()


def restore(traffic: CommCounters) -> None:
    """Sets the counters of training back to a ``copy`` of them."""
    vars(training_traffic).update(vars(traffic))


@contextmanager
def waiting() -> Iterator[None]:
    """Marks this rank as waiting for other ranks during the block."""
    progress.waiting_since = time.monotonic()
    try:
        yield
    finally:
        progress.waiting_since = None


@contextmanager
def collective(of_client: bool = False) -> Iterator[None]:
    """Counts the collective in the block as begun, and marks this rank as waiting."""
    if of_client:
        progress.client_collectives += 1
    else:
        progress.collectives += 1
    with waiting():
        yield
