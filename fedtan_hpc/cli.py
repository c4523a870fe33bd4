"""The command line: hydra's options to a checked ``Config``, a run, and an exit code.

Exit codes: 0 done; 1 a run failed; 2 a mistake in the options; 141 nobody reads; 128 and a signal's
number (130 for Ctrl-C, 138 for USR1, 143 for TERM) if it asked the run to stop.
(torchrun itself exits with 1 whatever its workers return.)
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from . import __version__
from .config import help
from .config.errors import ConfigError, RunError, Stopped, format_option_error
from .config.hydra_errors import explain, unknown, unreadable
from .config.schema import Config
from .config.validate import check
from .runtime import launcher_env

_NOBODY_READS = 128 + signal.SIGPIPE
"""As of a program whose output goes to ``head`` and that is ended by the signal."""


def main() -> None:
    """Run the job that the command line describes, or each of a sweep's (-m) in turn."""
    with exit_codes("fedtan_hpc"):
        if "--version" in sys.argv[1:]:
            print(f"fedtan_hpc {__version__}" if launcher_env.rank_hint() == 0 else "")
            return
        configs = compose()
        launcher_env.detect()
        for config in configs:
            check(config)
            launcher_env.threads(config.threads)
        check_folders(configs)
        from .job.run import (  # torch loads here, after all that can go wrong without it
            run,
            run_all,
        )

        if len(configs) == 1:
            run(configs[0])
        else:
            run_all(configs)


@contextmanager
def exit_codes(program: str) -> Iterator[None]:
    """Failures become lines of ``program`` on standard error and the process's exit code."""
    try:
        yield
        sys.stdout.flush()
    except ConfigError as error:
        everyones = "torch" not in sys.modules or error.on_all_ranks
        _leave(2, [f"{program}: {line}" for line in error.mistakes], everyones)
    except KeyboardInterrupt:
        if launcher_env.rank_hint() == 0:
            print(f"{program}: interrupted", file=sys.stderr, flush=True)
        _exit(130)
    except BrokenPipeError:
        _exit(_NOBODY_READS)
    except Stopped as error:
        _leave(128 + error.signal, [f"{program}: {error}"], everyones=True)
    except RunError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            _exit(_NOBODY_READS)
        if error.on_all_ranks:
            _leave(1, [f"{program}: {error}"], everyones=True)
        _fail(error.__cause__, f"{program}: {error}")
    except Exception as error:
        rank = launcher_env.rank_hint()
        _fail(error, f"{program}: rank {rank}: {type(error).__name__}: {error}")


Schema = TypeVar("Schema", bound=Config)


def compose(words: Sequence[str] | None = None) -> list[Config]:
    """The configurations that ``words`` (else the command line) ask for; one, or a sweep's (-m).

    Raises ``ConfigError`` for options that do not exist or have the wrong type.
    """
    return compose_as(Config, "config", words)


def compose_as(
    schema: type[Schema], entry: str, words: Sequence[str] | None = None
) -> list[Schema]:
    """The same for options of another ``schema``, which begin with the file ``entry`` of conf/."""
    words = sys.argv[1:] if words is None else list(words)
    _refuse_deletions(words)
    # hydra's own report is several lines and exits with 1; this makes it raise instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ConfigStore.instance().store(name="schema", node=schema)
    of_help = partial(help.text, schema)
    OmegaConf.register_new_resolver("manual", of_help, replace=True)
    composed: list[DictConfig] = []
    launch = hydra.main(version_base="1.3", config_path=str(_conf()), config_name=entry)
    usage = io.StringIO()
    speaks = launcher_env.rank_hint() == 0  # --help is rank 0's to print
    try:
        with (
            _command_line(words),
            redirect_stderr(usage),
            redirect_stdout(sys.stdout if speaks else io.StringIO()),
        ):
            launch(composed.append)()
        return [_to_config(config, schema) for config in composed]
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # hydra raises all three
        raise ConfigError(explain(error, words, schema)) from error
    except YAMLError as error:
        raise ConfigError(unreadable(error)) from error
    except SystemExit as error:
        if not error.code:
            raise
        raise ConfigError(_flag_mistake(usage.getvalue())) from error


@contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    """``words`` where hydra looks for its own."""
    own = sys.argv
    # argparse takes options in two lots for mistakes, with a flag between them.
    flags = [word for word in words if word in ("-m", "--multirun")]
    sys.argv = [own[0], *flags, *(word for word in words if word not in flags)]
    try:
        yield
    finally:
        sys.argv = own


def _refuse_deletions(words: Sequence[str]) -> None:
    """An option that ``~name`` took away would quietly have its default."""
    how = "options are not taken away; leave it out for its default, or give it a value"
    taken = [word for word in words if word.startswith("~") and not word.startswith("~hydra")]
    if taken:
        raise ConfigError(*(f"{word}: {how}" for word in taken))


def _flag_mistake(usage: str) -> str:
    """argparse's last line in place of its page."""
    reason = usage.strip().rpartition("error: ")[2]
    return f"{reason}; options are written name=value, and --help lists them"


def check_folders(configs: Sequence[Config]) -> None:
    """Raise ``ConfigError`` unless the points of a sweep have folders of their own."""
    shared = {config.run_dir for config in configs}
    if len(configs) > 1 and len(shared) < len(configs) and shared != {None}:
        folder = next(iter(shared - {None}))
        remedy = "leave run_dir out, or use the swept options in it, as in run_dir=runs/${seed}"
        raise ConfigError(
            format_option_error("run_dir", folder, "a folder for each point of a sweep", remedy)
        )


def _conf() -> Path:
    """conf/ beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def _to_config(composed: DictConfig, schema: type[Schema]) -> Schema:
    if added := list(_added(composed, schema())):
        raise ConfigError(*(unknown(option, value, schema) for option, value in added))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, schema)
    return config


def _added(composed: DictConfig, schema: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Options that ``+name=value`` brought in and the schema does not have."""
    names = {field.name for field in fields(schema)}
    found: list[tuple[str, Any]] = []
    for key in composed:
        if key not in names:
            found.append((prefix + str(key), composed[key]))
        elif is_dataclass(part := getattr(schema, str(key))):
            found += _added(composed[key], part, f"{prefix}{key}.")
    return found


def _fail(cause: BaseException | None, line: str) -> NoReturn:
    """This rank's own failure: the cause's traceback if there is one, the line, and out at once."""
    if cause is not None:
        traceback.print_exception(cause)
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    _exit(1)


def _leave(code: int, lines: list[str], everyones: bool = False) -> NoReturn:
    """Rank 0 speaks for all; the others give it time before they leave.

    Launchers end the other ranks as soon as one has failed, so a rank that left first could
    silence rank 0.  A rank that is still alive after the wait may have a trouble of its own to
    tell, unless it is ``everyones``.
    """
    if launcher_env.rank_hint() != 0:
        time.sleep(launcher_env.patience_seconds(everyones))
        if everyones:
            _exit(code)
    print("\n".join(lines), file=sys.stderr, flush=True)
    sys.stdout.flush()
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Out at once; under MPI with all other ranks, which would wait for this one for ever."""
    group = sys.modules.get(
        f"{__package__}.distributed.process_group"
    )  # not loaded before the options are checked
    if group is not None:
        group.end_job(code)
    os._exit(code)
