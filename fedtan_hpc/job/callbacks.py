"""Makes the callbacks of the option ``callbacks``, calls all callbacks, and names what fails."""

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from ..config.errors import ConfigError, RunError, format_option_error, one_line
from ..distributed import counters, process_group
from ..evaluation.callbacks import RoundCallback
from ..models import import_target
from ..runtime.signals import StopRequest

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_EVENTS = ("run_began", "round_ended", "run_ended", "run_failed")


def make(target: str) -> RoundCallback:
    """Returns what ``package.module:callable`` returns without arguments.

    Raises ``ConfigError`` if it cannot be imported or called, or returns no callback.
    """
    factory = import_target.resolve("callbacks", target, "a callback")
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

    A closed standard output (``BrokenPipeError``) does not count once ``stop`` is agreed on: Ctrl-C
    ends the program that reads it too, and the round is still to be saved.
    """
    ignored = [BrokenPipeError] if stop.agreed_signal else []
    for callback in callbacks:
        kind = type(callback)
        source = f"callback {kind.__module__}.{kind.__qualname__}.{event}: "
        with as_run_error(source), suppress(*ignored):
            getattr(callback, event)(argument)


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
    """Raises ``RunError`` for any exception inside, except for a ``RunError``.

    ``source`` names what runs inside.  The cause stays attached, for its traceback, unless the disk
    or another rank is to blame.
    """
    try:
        yield
    except RunError:
        raise
    except (Exception, SystemExit) as error:
        where = f"rank {process_group.rank()}, round {counters.progress.round}"
        is_lost_rank = process_group.is_lost_rank_error(error)
        what = f"{source}{type(error).__name__}: {error}"
        if is_lost_rank:
            what = f"another rank has ended ({str(error).splitlines()[0]})"
        is_external = is_lost_rank or (isinstance(error, OSError) and error.errno in _DISK_ERRORS)
        failure = RunError(f"{where}: {what}", on_all_ranks=False)
        raise failure from (None if is_external else error)
