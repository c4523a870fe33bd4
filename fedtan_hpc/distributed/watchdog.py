"""Names the rank that keeps all others waiting, and ends the job.

A collective that times out does not say which rank was missing.  So each rank notes in the channel
how many collectives it has begun.  When one rank has waited too long, the ranks that have begun
fewer collectives are those that hang.  A job starts the watchdog.

A process that is stopped (SIGSTOP) cannot end itself, and launchers wait for it, torchrun half a
minute.  So the ranks that end kill those of their node that hang.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from . import counters, process_group
from .channel import Channel

_CHECKS = 20
"""Checks within the time-out; there is at least one a second."""
_JOIN_SECONDS = 5
"""The longest time that ``end`` waits for a thread: the channel's server may hang."""
_MESSAGE_SECONDS = 0.3
"""Time for the launcher to read a rank's last message; some lose it once the rank has ended."""


class Process(NamedTuple):
    """A process of this machine or another: no other has these values until the next reboot."""

    machine: str
    """Its last start, its numbering of processes and its network.

    A rank with another network may be cut off but sound, and then says so itself.
    """
    number: int
    started: str
    """Time of its start."""

    @classmethod
    def of(cls, number: int) -> "Process | None":
        """Returns the process of this machine with ``number``; None if there is none."""
        try:
            start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
            status = Path(f"/proc/{number}/stat").read_text()
        except OSError:
            return None
        return cls(" ".join([start, *spaces]), number, status.rpartition(")")[2].split()[19])

    def kill(self) -> None:
        """Kills the process if it is one of this machine that still runs, and not this one."""
        if self.number != os.getpid() and Process.of(self.number) == self:
            with suppress(OSError):  # it has ended, or belongs to another user
                os.kill(self.number, signal.SIGKILL)


class Watchdog:
    """Two threads that watch the ranks from ``begin`` to ``end``.

    When a rank hangs, all ranks that do not print why, call ``report(message)`` and exit with 1.
    """

    def __init__(
        self, channel: Channel, timeout_seconds: float, report: Callable[[str], object]
    ) -> None:
        self._channel, self._report = channel, report
        self._timeout = timeout_seconds
        self._pause = min(1.0, timeout_seconds / _CHECKS)
        self._rank, self._world_size = process_group.rank(), process_group.world_size()
        self._ended = threading.Event()
        self._posted = ""
        """What this rank has noted: collectives of all ranks and of its client, and the client."""
        self._leaves = threading.Lock()
        self.processes: Sequence[Process | None] = ()
        """The processes of all ranks, by rank, once they are known."""
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
            number = counters.progress.round
            suspect = "a rank"
            if self._channel.secret:  # else nobody knows yet how far the ranks have come
                suspect = "rank 0, or the host that serves the ranks,"
            self._exit_with(f"round {number}: {suspect} hangs, is gone or cannot be reached", [0])

    def _check_ranks(self) -> None:
        progress = counters.progress
        client = "" if progress.client is None else progress.client
        note = f"{progress.collectives} {progress.client_collectives} {client}"
        if note != self._posted:
            self._posted = note
            self._channel.write(f"collectives/{self._rank}", note)
        if verdict := self._channel.read("verdict"):
            self._exit_with(f"rank {self._rank} ends: {verdict}", self._behind())
        # All ranks must read the verdict before the time-out, after which ``_check_clock`` acts.
        if self._has_waited(self._timeout - 4 * self._pause):
            behind = self._behind()
            if self._channel.is_first("verdict/given"):
                verdict = self._verdict(behind)
                self._channel.write("verdict", verdict)
                self._exit_with(verdict, behind)

    def _has_waited(self, seconds: float) -> bool:
        since = counters.progress.waiting_since
        return since is not None and time.monotonic() - since > seconds

    def _behind(self) -> list[int]:
        """Returns the ranks that have begun fewer collectives than this one.

        Ranks that wait wrote their counts long ago; other counts may be one check old.  A rank that
        waits for another one of its client is late too, and not to blame.
        """
        own = counters.progress.collectives, counters.progress.client_collectives
        counts = [self._begun(rank) for rank in range(self._world_size)]
        mates = process_group.ranks_of_client(self._rank)
        late = [
            rank
            for rank, begun in enumerate(counts)
            if begun[0] < own[0] or (rank in mates and begun < own)
        ]
        return [rank for rank in late if not self._waits_for_another(rank, counts)]

    def _note(self, rank: int) -> list[str]:
        return (self._channel.read(f"collectives/{rank}") or "0 0").split()

    def _begun(self, rank: int) -> tuple[int, int]:
        of_all, of_client, *_ = self._note(rank)
        return int(of_all), int(of_client)

    def _waits_for_another(self, rank: int, counts: Sequence[tuple[int, int]]) -> bool:
        mates = process_group.ranks_of_client(rank)
        return any(counts[mate] < counts[rank] for mate in mates)

    def _verdict(self, behind: Sequence[int]) -> str:
        """Says which ranks hang."""
        number = counters.progress.round
        when = f"in round {number}" if number else "before the first round"
        waited = f"rank {self._rank} has waited for about comm.timeout_seconds={self._timeout:g}"
        if not behind:
            return f"{when}: the ranks do not reach each other over the network; {waited}"
        ranks = f"rank {behind[0]} hangs" if len(behind) == 1 else f"ranks {behind[:20]} hang"
        mates = process_group.ranks_of_client(behind[0])
        if len(behind) == 1 and len(mates) > 1:
            # The note of a stopped process may be older than that of another rank of its client.
            clients = {" ".join(self._note(mate)[2:]) for mate in mates}
            known = clients.pop() if len(clients) == 1 else ""
            client = f"client {known}" if known else "the client"
            ranks = f"rank {behind[0]} of {client} on ranks {mates[0]} to {mates[-1]} hangs"
        return f"{ranks} {when}, or cannot be reached; {waited}"

    def _exit_with(self, verdict: str, hanging: Sequence[int] = ()) -> NoReturn:
        self._leaves.acquire()  # the first of the two threads; the other one waits for the end
        with suppress(OSError):  # standard error may be closed
            # Not through sys.stderr, which a progress bar may have replaced.
            os.write(2, f"\nfedtan_hpc: {verdict}\n".encode())
        # In a thread, since the file system may be what hangs.
        threading.Thread(target=self._report, args=(verdict,), daemon=True).start()
        time.sleep(_MESSAGE_SECONDS)
        if hanging and self.processes:
            time.sleep(self._pause)  # a rank whose own watchdog still runs reads the verdict
            for process in (self.processes[rank] for rank in hanging):
                if process is not None:
                    process.kill()
        # At once: the main thread is in a collective that does not end.
        sys.stdout.flush()
        os._exit(1)
