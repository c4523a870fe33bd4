"""Worker processes of this process: their memory, and whether they are idle.  Linux only."""

import os
import threading
import time
from pathlib import Path

_IDLE_SECONDS = 0.2


def children() -> list[int]:
    """Returns the process ids of this process's children."""
    lists = Path("/proc/self/task").glob("*/children")
    return [int(child) for each in lists for child in each.read_text().split()]


def wait_until_idle(seconds: float = 60) -> None:
    """Waits until no child has used a CPU for a while, at most ``seconds``."""
    deadline, used, since = time.monotonic() + seconds, -1, time.monotonic()
    while time.monotonic() < min(deadline, since + _IDLE_SECONDS):
        if (ticks := sum(map(_cpu_ticks, children()))) != used:
            used, since = ticks, time.monotonic()
        time.sleep(0.02)


def _cpu_ticks(process: int) -> int:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0
    return int(fields[11]) + int(fields[12])


def proportional_bytes(process: int) -> int:
    """Returns a process's memory, shared pages divided by those who share them (PSS)."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


class MemoryPeaks(threading.Thread):
    """Reads the memory of this process and its children until ``finish`` is called."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.workers = 0
        """Largest sum over the children, in bytes (PSS)."""
        self.everything = 0
        """Largest sum over this process and its children, in bytes (PSS)."""
        self._is_over = threading.Event()

    def run(self) -> None:
        """Reads ten times a second."""
        while not self._is_over.wait(0.1):
            self._read()

    def finish(self) -> None:
        """Ends the thread and reads once more, as the work may have been shorter than 0.1 s."""
        self._is_over.set()
        self.join()
        self._read()

    def _read(self) -> None:
        workers = sum(map(proportional_bytes, children()))
        self.workers = max(self.workers, workers)
        self.everything = max(self.everything, workers + proportional_bytes(os.getpid()))
