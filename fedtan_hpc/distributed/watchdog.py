"""Names the rank that keeps all others waiting, and ends the job.

A collective that times out does not say who was missing.  Here each rank notes beside the
collectives how many of them it has begun; when one has waited too long, the ranks that have begun
fewer than it are those that hang.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from . import counters, process_group
from .channel import Channel

_OFTEN = 20
"""Looks within the time-out; at least one a second."""
_LAST_LOOK_SECONDS = 5
"""For which the end waits at most: the channel's server may hang."""
_READING_SECONDS = 0.3
"""In which a launcher reads what a rank has said; some lose it when the rank has gone."""


class Watchdog:
    """A thread that looks after the ranks from ``begin`` to ``end``.

    ``tell(message)`` is called once, on one rank, before all leave with exit code 1.
    """

    def __init__(
        self, channel: Channel, timeout_seconds: float, tell: Callable[[str], object]
    ) -> None:
        self._channel, self._tell = channel, tell
        self._timeout = timeout_seconds
        self._pause = min(1.0, timeout_seconds / _OFTEN)
        self._rank, self._world_size = process_group.rank(), process_group.world_size()
        self._ended = threading.Event()
        self._posted = 0
        self._threads = [
            threading.Thread(target=self._every_pause, args=(each,), daemon=True)
            for each in (self._look, self._look_at_the_clock)
        ]

    def begin(self) -> None:
        """Look from now on."""
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Look no longer.

        A thread that is inside of torch's store while Python shuts down would abort the process.
        """
        self._ended.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_LAST_LOOK_SECONDS)

    def _every_pause(self, act: Callable[[], object]) -> None:
        while not self._ended.wait(self._pause):
            with suppress(
                RuntimeError
            ):  # of the channel: its server hangs, is gone or cannot be reached
                act()

    def _look_at_the_clock(self) -> None:
        """In a thread of its own: when its server hangs, the channel may do so too."""
        if self._has_waited(self._timeout):
            where = f"round {counters.progress.round}: rank 0, or the host that serves the ranks"
            self._leave(f"{where}, hangs, is gone or cannot be reached")

    def _look(self) -> None:
        if counters.progress.joined != self._posted:
            self._posted = counters.progress.joined
            self._channel.write(f"joined/{self._rank}", str(self._posted))
        if self._channel.read("verdict"):
            time.sleep(self._pause + _READING_SECONDS)  # the rank that tells it goes first
            _exit()
        if self._has_waited(self._timeout - 4 * self._pause):  # all are to leave in time
            verdict = self._verdict()
            if self._channel.is_first("verdict/given"):
                self._channel.write("verdict", verdict)
                self._leave(verdict)

    def _has_waited(self, seconds: float) -> bool:
        since = counters.progress.waiting_since
        return since is not None and time.monotonic() - since > seconds

    def _verdict(self) -> str:
        """Ranks that wait have noted so long ago; what others have noted may be a look old."""
        mine, number = counters.progress.joined, counters.progress.round
        notes = [self._channel.read(f"joined/{rank}") or 0 for rank in range(self._world_size)]
        behind = [rank for rank, joined in enumerate(notes) if int(joined) < mine]
        when = f"in round {number}" if number else "before the first round"
        waited = f"rank {self._rank} has waited for about comm.timeout_seconds={self._timeout:g}"
        if not behind:
            return f"{when}: the ranks do not reach each other over the network; {waited}"
        ranks = f"rank {behind[0]} hangs" if len(behind) == 1 else f"ranks {behind[:20]} hang"
        return f"{ranks} {when}, or cannot be reached; {waited}"

    def _leave(self, verdict: str) -> NoReturn:
        with suppress(OSError):  # nobody may read it any more
            # Not by sys.stderr, which a progress bar may have taken over.
            os.write(2, f"\nfedtan_hpc: {verdict}\n".encode())
        # It may be the file system that hangs.
        threading.Thread(target=self._tell, args=(verdict,), daemon=True).start()
        time.sleep(_READING_SECONDS)
        _exit()


def _exit() -> NoReturn:
    """The main thread is in a collective that will not end."""
    sys.stdout.flush()
    os._exit(1)
