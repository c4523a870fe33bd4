"""Hydra's flags: which files are composed, whether options are swept, and what is only shown."""

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser

from ..config.errors import ConfigError
from ..runtime import launcher_env

_SHOW = ("help", "hydra_help", "cfg", "info", "shell_completion")
_REFUSED = {
    "--config-path": "--config-dir adds a folder of files to those of the package",
    "--experimental-rerun": "a run in the same run_dir goes on by itself, and resume names another",
}
"""Flags that would leave out the package's own files, with the remedy."""


@dataclass(frozen=True)
class Flags:
    """A command line, divided into hydra's flags and options."""

    options: list[str]
    flags: list[str]
    """The words that are not options, in their order."""
    sweeps: bool
    shows: bool
    """Whether hydra shows something, as with --help, and nothing is composed."""
    config_name: str | None
    config_dir: str | None


def parse(words: Sequence[str]) -> Flags:
    """Divides ``words``, in which flags and options stand in any order.

    Raises ``ConfigError`` for a flag that does not exist or has no use here.
    """
    usage = io.StringIO()
    try:
        with redirect_stderr(usage):
            given = get_args_parser().parse_intermixed_args(words)
    except SystemExit as error:
        if not error.code:  # --version
            raise
        reason = usage.getvalue().strip().rpartition("error: ")[2]  # a page of usage is before it
        remedy = "options are written name=value, and --help lists them"
        raise ConfigError(f"{reason}; {remedy}") from error
    for flag, remedy in _REFUSED.items():
        if getattr(given, flag.removeprefix("--").replace("-", "_")) is not None:
            raise ConfigError(f"{flag}: not understood; {remedy}")
    if given.cfg is None and (given.resolve or given.package):
        flag = "--resolve" if given.resolve else "--package"
        raise ConfigError(f"{flag}: not understood; it goes with --cfg")
    shows = any(getattr(given, name) for name in _SHOW)
    if shows and given.multirun:
        raise ConfigError("-m: not understood beside a flag that shows something; leave one out")
    options, rest = list(given.overrides), []
    for word in words:
        if options and word == options[0]:
            options.pop(0)
        else:
            rest.append(word)
    return Flags(given.overrides, rest, given.multirun, shows, given.config_name, given.config_dir)


def show(given: Flags, entry: str, folder: Path) -> None:
    """Lets hydra print what a flag asks for, on rank 0.

    Args:
        given: the command line; it ``shows`` something.
        entry: the file of ``folder`` that the options are composed from.
        folder: the absolute path of the configuration files.
    """
    launch = hydra.main(version_base="1.3", config_path=str(folder), config_name=entry)
    output = sys.stdout if launcher_env.rank_hint() == 0 else io.StringIO()
    with _command_line([*given.flags, *given.options]), redirect_stdout(output):
        launch(_nothing)()


def _nothing(_: object) -> None:
    """Stands for the program, which does not run when hydra shows something."""


@contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    """Puts ``words`` into ``sys.argv``, where hydra looks."""
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before
