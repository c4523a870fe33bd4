"""The command line: from hydra's options to a checked ``Config``, a run, and an exit code.

Exit codes: 0 done; 1 a run failed; 2 a mistake in the options; 141 nobody reads the output; 128
plus the number of a signal (130 for Ctrl-C, 138 for USR1, 143 for TERM) that stopped the run.
torchrun itself exits with 1 whatever its workers return.  Other commands use ``compose_as`` and
``exit_codes``.
"""

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
from .config import help, path_options
from .config.errors import ConfigError, OutputClosedError, RunError, Stopped, format_option_error
from .config.hydra_errors import explain, unknown, unreadable
from .config.schema import Config
from .config.validate import check
from .runtime import failure_file, launcher_env

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
        with _failure_file():
            yield
        sys.stdout.flush()
    except ConfigError as error:
        # Before torch loads, every rank checks the options and finds the same mistakes.
        on_all_ranks = "torch" not in sys.modules or error.on_all_ranks
        _leave(2, [f"{program}: {line}" for line in error.mistakes], on_all_ranks)
    except KeyboardInterrupt:
        if launcher_env.rank_hint() == 0:
            print(f"{program}: interrupted", file=sys.stderr, flush=True)
        _exit(130)
    except (BrokenPipeError, OutputClosedError):
        _exit(_NOBODY_READS)
    except Stopped as error:
        _leave(128 + error.signal, [f"{program}: {error}"], on_all_ranks=True)
    except RunError as error:
        if error.on_all_ranks:
            _leave(1, [f"{program}: {error}"], on_all_ranks=True)
        _fail(error.__cause__, f"{program}: {error}")
    except Exception as error:
        rank = launcher_env.rank_hint()
        _fail(error, f"{program}: rank {rank}: {type(error).__name__}: {error}")


@contextmanager
def _failure_file() -> Iterator[None]:
    """Marks for the batch script that another try fails too, unless another rank was lost."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
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


Schema = TypeVar("Schema", bound=Config)


def compose(words: Sequence[str] | None = None) -> list[Config]:
    """Returns the configurations of ``words``, by default the command line's; several with -m.

    Raises ``ConfigError`` for options that do not exist or have the wrong type.
    """
    return compose_as(Config, "config", words)


def compose_as(
    schema: type[Schema], entry: str, words: Sequence[str] | None = None
) -> list[Schema]:
    """Does what ``compose`` does, for another ``schema`` and its file ``entry`` of conf/."""
    words = sys.argv[1:] if words is None else list(words)
    _refuse_deletions(words)
    if topics := [word.partition("=")[2] for word in words if word.startswith("--help=")]:
        text = help.topic(topics[0], schema)
        if launcher_env.rank_hint() == 0:
            print(text)
        return []
    # By default hydra prints several lines and exits with 1; with this it raises instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ConfigStore.instance().store(name="schema", node=schema)
    for part in (help.choices, help.overview):  # of the template of --help in conf/config.yaml
        OmegaConf.register_new_resolver(part.__name__, partial(part, schema), replace=True)
    composed: list[DictConfig] = []
    launch = hydra.main(version_base="1.3", config_path=str(_conf()), config_name=entry)
    usage = io.StringIO()
    output = sys.stdout if launcher_env.rank_hint() == 0 else io.StringIO()  # for --help
    try:
        with (
            _command_line(path_options.quoted(words)),
            redirect_stderr(usage),
            redirect_stdout(output),
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
        reason = usage.getvalue().strip().rpartition("error: ")[2]  # argparse prints a page before
        remedy = "options are written name=value, and --help lists them"
        raise ConfigError(f"{reason}; {remedy}") from error


@contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    """Puts ``words`` into ``sys.argv``, where hydra looks."""
    before = sys.argv
    # argparse reports options on both sides of a flag as a mistake.
    flags = [word for word in words if word in ("-m", "--multirun")]
    sys.argv = [before[0], *flags, *(word for word in words if word not in flags)]
    try:
        yield
    finally:
        sys.argv = before


def _refuse_deletions(words: Sequence[str]) -> None:
    """Refuses ``~name``, after which the option would silently have its default."""
    how = "options cannot be removed; leave it out for its default, or give it a value"
    deletions = [word for word in words if word.startswith("~") and not word.startswith("~hydra")]
    if deletions:
        raise ConfigError(*(f"{word}: {how}" for word in deletions))


def check_folders(configs: Sequence[Config]) -> None:
    """Raises ``ConfigError`` if points of a sweep have one folder."""
    shared = {config.run_dir for config in configs}
    if len(configs) > 1 and len(shared) < len(configs) and shared != {None}:
        folder = next(iter(shared - {None}))
        remedy = "leave run_dir out, or use the swept options in it, as in run_dir=runs/${seed}"
        raise ConfigError(
            format_option_error("run_dir", folder, "a folder for each point of a sweep", remedy)
        )


def _conf() -> Path:
    """Returns the folder conf/: beside the package in a checkout, in the package in a wheel."""
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
    """Returns the options that ``+name=value`` added to those of the schema."""
    names = {field.name for field in fields(schema)}
    added: list[tuple[str, Any]] = []
    for key in composed:
        if key not in names:
            added.append((prefix + str(key), composed[key]))
        elif is_dataclass(group := getattr(schema, str(key))):
            added += _added(composed[key], group, f"{prefix}{key}.")
    return added


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
    if launcher_env.rank_hint() != 0:
        time.sleep(launcher_env.exit_delay_seconds(on_all_ranks))
        if on_all_ranks:
            _exit(code)
    print("\n".join(lines), file=sys.stderr, flush=True)
    sys.stdout.flush()
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Ends this process; under MPI also all other ranks, which would wait for it for ever."""
    if (group := _process_group()) is not None:
        group.end_job(code)
    os._exit(code)


def _process_group() -> Any:
    return sys.modules.get(f"{__package__}.distributed.process_group")
