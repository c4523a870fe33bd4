"""Makes the callbacks of the option ``callbacks``, calls all callbacks, and names what fails."""

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..config.errors import ConfigError, OutputClosedError, RunError, format_option_error, one_line
from ..data.loading import is_worker_error
from ..data.own.items import DataError
from ..distributed import counters, process_group
from ..evaluation.callbacks import RoundCallback
from ..evaluation.loggers import Display
from ..runtime import import_path
from ..runtime.signals import Interrupted, StopRequest
from .checkpoint_writer import CheckpointWriter

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_EVENTS = ("run_began", "round_ended", "run_ended", "run_failed")


def make(target: str) -> RoundCallback:
    """Returns what ``package.module:callable`` returns without arguments.

    Raises ``ConfigError`` if it cannot be imported or called, or returns no callback.
    """
    factory = import_path.resolve("callbacks", target, "a callback")
    try:
        callback = factory()
    except (Exception, SystemExit) as error:
        allowed, remedy = "a callable without arguments", f"it raised {one_line(error)}"
        raise ConfigError(format_option_error("callbacks", target, allowed, remedy)) from error
    for event in _EVENTS:
        if not callable(getattr(callback, event, None)):
            allowed = "a callable that returns a fedtan_hpc.RoundCallback"
            remedy = f"it returned a {type(callback).__name__}, which has no method {event}"
            raise ConfigError(format_option_error("callbacks", target, allowed, remedy))
    return callback  # type: ignore[no-any-return]


def tell(
    callbacks: Sequence[RoundCallback], event: str, argument: object, stop: StopRequest
) -> None:
    """Calls the method ``event`` of all ``callbacks``; names the one that fails in a ``RunError``.

    If nobody reads the display, the error is an ``OutputClosedError``.  It does not count once
    ``stop`` is agreed on: Ctrl-C ends the reader too, and the round is still to be saved.
    """
    for callback in callbacks:
        if event == "round_probed" and not hasattr(callback, event):  # one that is no RoundCallback
            continue
        kind = type(callback)
        source = f"callback {kind.__module__}.{kind.__qualname__}.{event}: "
        if isinstance(callback, CheckpointWriter):  # no other callback communicates with ranks
            source = ""
        try:
            with as_run_error(source):
                getattr(callback, event)(argument)
        except RunError as error:
            if not (isinstance(callback, Display) and isinstance(error.__cause__, BrokenPipeError)):
                raise
            if not stop.agreed_signal:
                raise OutputClosedError(str(error), on_all_ranks=False) from None


def tell_failure(
    callbacks: Sequence[RoundCallback], error: BaseException, stop: StopRequest
) -> None:
    """Calls ``run_failed`` of all ``callbacks`` and prints their exceptions."""
    for callback in callbacks:
        try:
            tell([callback], "run_failed", error, stop)
        except RunError as another:
            print(f"fedtan_hpc: {another}", file=sys.stderr, flush=True)


@contextmanager
def as_run_error(source: str = "") -> Iterator[None]:
    """Raises ``RunError`` for any exception inside, also for an exit of the user's code.

    ``source`` names the callback that runs inside.  Without it, the code inside is the job's: then
    a ``RunError`` passes, and an error of the network means that another rank is lost.  The cause
    stays attached, for its traceback, unless the disk or another rank is to blame.
    """
    try:
        yield
    except Interrupted:
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, RunError | ConfigError) and not source:
            raise
        where = f"rank {process_group.rank()}, round {counters.progress.round}"
        group = process_group.ranks_of_client(process_group.rank())
        if len(group) > 1:
            client, which = counters.progress.client, f"ranks {group[0]} to {group[-1]}"
            where += f", group of {which}" if client is None else f", client {client} on {which}"
        if not source and process_group.is_lost_rank_error(error):
            what = f"another rank has ended ({str(error).splitlines()[0]})"
            raise process_group.LostRankError(f"{where}: {what}", on_all_ranks=False) from None
        is_known = isinstance(error, OSError) and error.errno in _DISK_ERRORS
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, DataError) or is_worker_error(error):
            what, is_known = " ".join(str(error).split()), True
        failure = RunError(f"{where}: {source}{what}", on_all_ranks=False)
        raise failure from (None if is_known else error)
