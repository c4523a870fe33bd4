"""Names the rank that keeps all others waiting, and ends the job.

A collective that times out does not say which rank was missing.  So each rank notes in the channel
how many collectives it has begun.  When one rank has waited too long, the ranks that have begun
fewer collectives are those that hang.  A job starts the watchdog.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from . import counters, process_group
from .channel import Channel

_CHECKS = 20
"""Checks within the time-out; there is at least one a second."""
_JOIN_SECONDS = 5
"""The longest time that ``end`` waits for a thread: the channel's server may hang."""
_MESSAGE_SECONDS = 0.3
"""Time for the launcher to read a rank's last message; some lose it once the rank has ended."""


class Watchdog:
    """Two threads that watch the ranks from ``begin`` to ``end``.

    When a rank hangs, ``report(message)`` is called once, on one rank; then all ranks exit with 1.
    """

    def __init__(
        self, channel: Channel, timeout_seconds: float, report: Callable[[str], object]
    ) -> None:
        self._channel, self._report = channel, report
        self._timeout = timeout_seconds
        self._pause = min(1.0, timeout_seconds / _CHECKS)
        self._rank, self._world_size = process_group.rank(), process_group.world_size()
        self._ended = threading.Event()
        self._posted = 0
        # The clock has a separate thread: when the channel's server hangs, its calls may hang too.
        self._threads = [
            threading.Thread(target=self._repeat, args=(check,), daemon=True)
            for check in (self._check_ranks, self._check_clock)
        ]

    def begin(self) -> None:
        """Starts watching."""
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Stops watching.

        It waits for the threads: one inside torch's store at shutdown would abort the process.
        """
        self._ended.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_JOIN_SECONDS)

    def _repeat(self, check: Callable[[], object]) -> None:
        while not self._ended.wait(self._pause):
            with suppress(RuntimeError):  # the channel's server hangs, has ended or is unreachable
                check()

    def _check_clock(self) -> None:
        if self._has_waited(self._timeout):
            where = f"round {counters.progress.round}: rank 0, or the host that serves the ranks"
            self._exit_with(f"{where}, hangs, is gone or cannot be reached")

    def _check_ranks(self) -> None:
        if counters.progress.collectives != self._posted:
            self._posted = counters.progress.collectives
            self._channel.write(f"collectives/{self._rank}", str(self._posted))
        if self._channel.read("verdict"):
            time.sleep(self._pause + _MESSAGE_SECONDS)  # the rank that reports exits first
            _exit()
        # All ranks must read the verdict before the time-out, after which ``_check_clock`` acts.
        if self._has_waited(self._timeout - 4 * self._pause):
            verdict = self._verdict()
            if self._channel.is_first("verdict/given"):
                self._channel.write("verdict", verdict)
                self._exit_with(verdict)

    def _has_waited(self, seconds: float) -> bool:
        since = counters.progress.waiting_since
        return since is not None and time.monotonic() - since > seconds

    def _verdict(self) -> str:
        """Says which ranks hang.

        Ranks that wait wrote their counts long ago; other counts may be one check old.
        """
        begun, number = counters.progress.collectives, counters.progress.round
        counts = [
            self._channel.read(f"collectives/{rank}") or 0 for rank in range(self._world_size)
        ]
        behind = [rank for rank, count in enumerate(counts) if int(count) < begun]
        when = f"in round {number}" if number else "before the first round"
        waited = f"rank {self._rank} has waited for about comm.timeout_seconds={self._timeout:g}"
        if not behind:
            return f"{when}: the ranks do not reach each other over the network; {waited}"
        ranks = f"rank {behind[0]} hangs" if len(behind) == 1 else f"ranks {behind[:20]} hang"
        return f"{ranks} {when}, or cannot be reached; {waited}"

    def _exit_with(self, verdict: str) -> NoReturn:
        with suppress(OSError):  # standard error may be closed
            # Not through sys.stderr, which a progress bar may have replaced.
            os.write(2, f"\nfedtan_hpc: {verdict}\n".encode())
        # In a thread, since the file system may be what hangs.
        threading.Thread(target=self._report, args=(verdict,), daemon=True).start()
        time.sleep(_MESSAGE_SECONDS)
        _exit()


def _exit() -> NoReturn:
    """Ends the process at once: its main thread is in a collective that does not end."""
    sys.stdout.flush()
    os._exit(1)
