"""Signals that ask a run to stop: the round in progress is finished and saved first.  No torch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from . import launcher_env

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""SLURM sends TERM when it preempts or cancels, USR1 before the time limit as our scripts ask it
to, submitit USR2; INT is a user's Ctrl-C."""


class StopRequest:
    """Whether a signal has asked for the end, and which."""

    def __init__(self) -> None:
        self.signal = 0
        self.agreed = 0
        """The signal that the ranks have agreed on at the end of a round."""
        self.in_rounds = False
        """Whether there is a round to wait for: Ctrl-C does not wait for the first."""

    def ask(self, number: int, _: FrameType | None = None) -> None:
        """The handler; a second Ctrl-C does not wait for the round either."""
        if number == signal.SIGINT and (self.signal == number or not self.in_rounds):
            raise KeyboardInterrupt
        first, self.signal = not self.signal, int(number)
        if first and launcher_env.rank_hint() == 0:
            with suppress(OSError):  # Ctrl-C ends a tee that reads us, too
                # Unlike print, this may be called while another print is under way.
                os.write(2, f"\n{name(number)}: the run ends after this round\n".encode())


def name(number: int) -> str:
    """Of a signal, such as SIGTERM."""
    return signal.Signals(number).name


@contextmanager
def watched() -> Iterator[StopRequest]:
    """Signals ask the ``StopRequest`` that is given, in the main thread; handlers are put back after."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in ASKING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not Python's own
