"""The command line: from hydra's options to a checked ``Config``, a run, and an exit code.

Exit codes: 0 done; 1 a run failed; 2 a mistake in the options; 141 nobody reads the output; 128
plus the number of a signal (130 for Ctrl-C, 138 for USR1, 143 for TERM) that stopped the run.
torchrun itself exits with 1 whatever its workers return.  Other commands use ``compose_as`` and
``exit_codes``.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from . import __version__
from .command_line.compose import compose as compose
from .command_line.compose import compose_as as compose_as
from .config.errors import (
    ConfigError,
    OutputClosedError,
    RunError,
    Stopped,
    format_option_error,
    printable,
)
from .config.schema import Config
from .config.validate import check
from .runtime import failure_file, launcher_env
from .runtime.signals import INTERRUPTED, Interrupted, interrupted_by_ctrl_c, say_interrupted

_NOBODY_READS = 128 + signal.SIGPIPE
"""The exit code of a program that SIGPIPE ends, as in ``program | head``."""


def main() -> None:
    """Runs the job that the command line describes, or the points of a sweep (-m) in turn."""
    with exit_codes("fedtan_hpc"):
        if "--version" in sys.argv[1:]:
            print(f"fedtan_hpc {__version__}" if launcher_env.rank_hint() == 0 else "")
            return
        configs = compose()
        if not configs:  # a flag such as --cfg, with which hydra only shows something
            return
        launcher_env.detect()
        for config in configs:
            check(config)
            launcher_env.threads(config.threads)
        check_folders(configs)
        from .job import run as job  # loads torch, after all checks that do not need it

        job.keep_freed_memory(configs[0])
        if len(configs) == 1:
            job.run(configs[0])
        else:
            job.run_all(configs)


@contextmanager
def exit_codes(program: str) -> Iterator[None]:
    """Ends the process after a failure: lines that begin with ``program``, and an exit code."""
    try:
        with _failure_file(), interrupted_by_ctrl_c():
            yield
        sys.stdout.flush()
    except ConfigError as error:
        # Before torch loads, every rank checks the options and finds the same mistakes.
        on_all_ranks = "torch" not in sys.modules or error.on_all_ranks
        _leave(2, [f"{program}: {line}" for line in error.mistakes], on_all_ranks)
    except Interrupted:
        say_interrupted(program)
        _exit(INTERRUPTED)
    except (BrokenPipeError, OutputClosedError):
        _exit(_NOBODY_READS)
    except Stopped as error:
        _leave(128 + error.signal, [f"{program}: {error}"], on_all_ranks=True)
    except RunError as error:
        if error.on_all_ranks:
            _leave(1, [f"{program}: {error}"], on_all_ranks=True)
        _fail(error.__cause__, f"{program}: {error}")
    except (Exception, KeyboardInterrupt) as error:  # not of Ctrl-C, but of the user's code
        rank = launcher_env.rank_hint()
        _fail(error, printable(f"{program}: rank {rank}: {type(error).__name__}: {error}"))


@contextmanager
def _failure_file() -> Iterator[None]:
    """Marks for the batch script that another try fails too, unless another rank was lost."""
    try:
        yield
    except (Stopped, Interrupted):
        raise
    except (Exception, KeyboardInterrupt) as error:
        group = _process_group()
        if group is None or not group.is_lost_rank_error(error):
            failure_file.write()
        raise


def import_from_current_folder() -> None:
    """Lets programs that Python starts by their path import networks from the current folder.

    ``python -m`` does so by itself.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(1, os.getcwd())


def check_folders(configs: Sequence[Config]) -> None:
    """Raises ``ConfigError`` if points of a sweep have one folder."""
    shared = {config.run_dir for config in configs}
    if len(configs) > 1 and len(shared) < len(configs) and shared != {None}:
        folder = next(iter(shared - {None}))
        remedy = "leave run_dir out, or use the swept options in it, as in run_dir=runs/${seed}"
        raise ConfigError(
            format_option_error("run_dir", folder, "a folder for each point of a sweep", remedy)
        )


def _fail(cause: BaseException | None, line: str) -> NoReturn:
    """Reports a failure of this rank, with the cause's traceback, and ends it at once."""
    if cause is not None:
        traceback.print_exception(cause)
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    _exit(1)


def _leave(code: int, lines: list[str], on_all_ranks: bool) -> NoReturn:
    """Lets rank 0 report a failure first; the other ranks wait before they leave.

    Launchers end the other ranks as soon as one has failed, so a rank that leaves first may
    silence rank 0.  A rank that still runs after the wait reports the failure too, unless it
    happened ``on_all_ranks``.
    """
    group = _process_group()
    if launcher_env.rank_hint() != 0:
        wait = time.sleep if group is None else group.wait_for_report
        wait(launcher_env.exit_delay_seconds(on_all_ranks))
        if on_all_ranks:
            _exit(code)
    print("\n".join(lines), file=sys.stderr, flush=True)
    sys.stdout.flush()
    if group is not None:
        group.say_reported()
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Ends this process; under MPI also all other ranks, which would wait for it for ever."""
    if (group := _process_group()) is not None:
        group.end_job(code)
    os._exit(code)


def _process_group() -> Any:
    return sys.modules.get(f"{__package__}.distributed.process_group")
