"""How a rank waits for others: with a time-out, and not longer than the world is whole.

``mpi.work`` and ``mpi.process_group`` wait with these functions.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from .library import abort

_EAGER_SECONDS = 0.01
"""A rank that has waited so long pauses between two looks and leaves its core to others."""
_PAUSE_SECONDS = 5e-5
_GUARD_SECONDS = 0.2
"""Time between two looks of the guard."""
_failures: list[str] = []


def wait_until(is_done: Callable[[], bool], deadline: float) -> bool:
    """Calls ``is_done`` until it is true, and returns whether it was so before ``deadline``.

    ``deadline`` is a time of ``time.monotonic``.  Each call lets MPI move messages.
    """
    if is_done():
        return True
    eager_until = time.monotonic() + _EAGER_SECONDS
    while not is_done():
        now = time.monotonic()
        if now > deadline:
            return False
        if now > eager_until:
            time.sleep(_PAUSE_SECONDS)
        else:
            os.sched_yield()  # not all MPI libraries yield, and another rank may need the core
    return True


def timeout_message(title: str, seconds: float) -> str:
    """Returns what is said of an operation that not all its ranks have joined in ``seconds``."""
    return (
        f"{title} over MPI: Timed out after {seconds:g} s: a rank that it needs has not joined it"
    )


def note_failure(message: str) -> None:
    """Lets this process end all others when it ends: MPI_Finalize would wait for lost messages."""
    if not _failures:
        atexit.register(_end_world)  # the last registered runs first, so before MPI_Finalize
    _failures.append(message)


def has_failed() -> bool:
    """Returns whether an operation of MPI failed in this process."""
    return bool(_failures)


def _end_world() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    abort(1)
    os._exit(1)  # an abort of MPI may return


class Guard:
    """Ends the job when a blocking call of MPI lasts too long: nothing can interrupt such a call.

    It guards the calls that must not take longer for being watched, each in a ``with`` statement.
    """

    _calls: dict[int, tuple[float, Callable[[], tuple[str, float]]]] = {}  # noqa: RUF012
    _thread: threading.Thread | None = None

    __slots__ = ("_describe",)

    def __init__(self, describe: Callable[[], tuple[str, float]]) -> None:
        """``describe`` returns a title of the call, and how many seconds it may take."""
        self._describe = describe
        if Guard._thread is None:
            Guard._thread = threading.Thread(target=_watch, daemon=True)
            Guard._thread.start()

    def __enter__(self) -> None:
        Guard._calls[threading.get_ident()] = (time.monotonic(), self._describe)

    def __exit__(self, *_: object) -> None:
        del Guard._calls[threading.get_ident()]


def _watch() -> None:
    while True:
        time.sleep(_GUARD_SECONDS)
        for begin, describe in list(Guard._calls.values()):
            title, seconds = describe()
            if time.monotonic() > begin + seconds:
                with suppress(OSError):  # standard error may be closed
                    os.write(2, f"\nfedtan_hpc: {timeout_message(title, seconds)}\n".encode())
                _end_world()
