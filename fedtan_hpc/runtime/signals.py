"""Signals that ask a run to stop after the round in progress.  No torch.

A job handles them from its start; the trainer reads the ``StopRequest`` at the end of each round.
"""

import math
import os
import signal
import sys
import threading
import time
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
_SOON = 10.0
"""Seconds after Ctrl-C in which it is to blame for an error."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C.  Any other ``KeyboardInterrupt`` is one that the user's code has raised."""


class CtrlC:
    """Ctrl-C raises ``Interrupted``, and so do errors that follow it.

    While modules load, Python and libraries make other errors of it, such as a ``RuntimeError``.
    """

    def __init__(self) -> None:
        self._pressed_at = -math.inf

    def interrupt(self, _: int = 0, __: FrameType | None = None) -> NoReturn:
        """Handles the signal."""
        self._pressed_at = time.monotonic()
        raise Interrupted

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Raises ``Interrupted`` in place of an error soon after Ctrl-C."""
        try:
            yield
        except Exception as error:
            if time.monotonic() - self._pressed_at < _SOON:
                raise Interrupted from error
            raise


class StopRequest:
    """The signal that asked this rank to stop, and the one on which all ranks agreed."""

    def __init__(self) -> None:
        self.signal = 0
        """The signal that this rank received; 0 for none."""
        self.agreed_signal = 0
        """The signal on which the ranks agreed at the end of a round; 0 for none."""
        self.has_begun_rounds = False
        """Whether there is a round to finish; until then Ctrl-C ends the run at once."""
        self.ctrl_c = CtrlC()

    def ask(self, number: int, _: FrameType | None = None) -> None:
        """Handles signal ``number``; a second Ctrl-C does not wait for the round either."""
        if number == signal.SIGINT and (self.signal == number or not self.has_begun_rounds):
            self.ctrl_c.interrupt()
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
    ctrl_c = CtrlC()
    signal.signal(signal.SIGINT, ctrl_c.interrupt)
    try:
        with ctrl_c.blamed():
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def say_interrupted(program: str) -> None:
    """Prints on rank 0 that Ctrl-C ends the program."""
    if launcher_env.rank_hint() == 0:
        with suppress(OSError):  # Ctrl-C also ends a tee that reads our output
            print(f"{program}: interrupted", file=sys.stderr, flush=True)


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
        with stop.ctrl_c.blamed():
            yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set by Python
