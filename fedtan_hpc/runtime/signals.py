"""Signals that ask a run to stop after the round in progress.  No torch.

A job handles them from its start; the trainer reads the ``StopRequest`` at the end of each round.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from . import launcher_env

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""SLURM sends TERM when it preempts or cancels a job, and USR1 before the time limit, as the job
script asks it to.  submitit sends USR2.  Ctrl-C sends INT."""


INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C.  Any other ``KeyboardInterrupt`` is one that the user's code has raised."""


class StopRequest:
    """The signal that asked this rank to stop, and the one on which all ranks agreed."""

    def __init__(self) -> None:
        self.signal = 0
        """The signal that this rank received; 0 for none."""
        self.agreed_signal = 0
        """The signal on which the ranks agreed at the end of a round; 0 for none."""
        self.has_begun_rounds = False
        """Whether there is a round to finish; until then Ctrl-C ends the run at once."""

    def ask(self, number: int, _: FrameType | None = None) -> None:
        """Handles signal ``number``; a second Ctrl-C does not wait for the round either."""
        if number == signal.SIGINT and (self.signal == number or not self.has_begun_rounds):
            raise Interrupted
        is_first, self.signal = not self.signal, int(number)
        if is_first and launcher_env.rank_hint() == 0:
            with suppress(OSError):  # Ctrl-C also ends a tee that reads our output
                # Unlike print, os.write may interrupt another print.
                os.write(2, f"\n{name(number)}: the run ends after this round\n".encode())


def name(number: int) -> str:
    """Returns the name of a signal, such as SIGTERM."""
    return signal.Signals(number).name


@contextmanager
def interrupted_by_ctrl_c() -> Iterator[None]:
    """Lets Ctrl-C raise ``Interrupted`` where it raises Python's ``KeyboardInterrupt``."""
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(_: int, frame: FrameType | None) -> NoReturn:
    while frame is not None:
        # While a module loads, torch and Python itself turn exceptions into others.
        if "importlib._bootstrap" in frame.f_code.co_filename:
            if launcher_env.rank_hint() == 0:
                os.write(2, b"fedtan_hpc: interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise Interrupted


@contextmanager
def handle_stop_signals() -> Iterator[StopRequest]:
    """Yields a ``StopRequest`` that ``STOP_SIGNALS`` ask, then restores the former handlers.

    Outside of the main thread, where Python allows no handlers, nothing asks it.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {number: signal.signal(number, stop.ask) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set by Python
