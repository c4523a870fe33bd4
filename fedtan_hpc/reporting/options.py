"""Options of a tool beside those of a job, all written as hydra's words (name=value).

Used by the commands of this room and by the tools of a checkout.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString

from .. import cli
from ..command_line import sweep
from ..config import path_options
from ..config.errors import ConfigError, format_option_error
from ..config.schema import Config
from ..runtime import launcher_env


def shows_help(words: Sequence[str], text: str | None) -> bool:
    """Returns whether the words ask for help; if so, rank 0 prints the tool's ``text``."""
    asks = bool({"--help", "-h"} & set(words))
    if asks and launcher_env.rank_hint() == 0:
        print((text or "").strip())
    return asks


def check_plotting() -> None:
    """Raises ``ConfigError`` if matplotlib is missing, before any work is done."""
    if find_spec("matplotlib") is None:
        raise ConfigError("matplotlib is not installed: pip install 'fedtan_hpc[plot]'")


def split(words: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the words that set the tool's options, by their ``names``, and the job's words."""
    tool_options: dict[str, str] = {}
    job = []
    for word in words:
        name, equals, _ = word.partition("=")
        if name in names and equals:
            tool_options[name] = word
        elif name.lstrip("+~") in names:
            raise ConfigError(f"{word}: not understood; write {name.lstrip('+~')}=value")
        else:
            job.append(word)
    return tool_options, job


def folder(word: str) -> str:
    """Returns the path that the word ``out=path`` names."""
    name, _, path = word.partition("=")
    if not path.strip():
        allowed = "the name of a file or folder"
        raise ConfigError(format_option_error(name, path, allowed, "name it"))
    return str(path_options.expanded(path))


def is_count(text: str, most: int, least: int = 1) -> bool:
    """Returns whether the text is a whole number from ``least`` to ``most``."""
    # Python refuses to convert thousands of digits.
    return text.isdecimal() and len(text) <= len(str(most)) and least <= int(text) <= most


def check_writable(path: Path) -> None:
    """Raises ``ConfigError`` if no file can be made at ``path``, before any work is done."""
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "a folder" if path.is_dir() else "not writable")


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` of what is written at ``path`` into a ``ConfigError`` of ``out``."""
    try:
        yield
    except OSError as error:
        allowed, remedy = "a place that can be written", f"choose another ({error.strerror})"
        raise ConfigError(format_option_error("out", path, allowed, remedy)) from error


def values(word: str, example: str) -> list[Any]:
    """Returns the values of ``name=[a,b]``; also of ``name=a``, ``name=a,b`` and a range."""
    name, _, text = word.partition("=")
    wrong = ConfigError(format_option_error(name, text, "a list", f"for example {name}={example}"))
    try:
        override = OverridesParser.create().parse_override(word)
        value: Any = override.value()
        if override.is_sweep_override():
            sweep.points([override])  # refuses a range of 10^18 numbers before it is listed
            swept = override.sweep_iterator()
            value = [each.text if isinstance(each, QuotedString) else each for each in swept]
    except ConfigError:
        raise
    except Exception as error:  # hydra's own, or that of Python's conversion of a number
        raise wrong from error
    items = value if isinstance(value, list) else [value]
    if not items or any(item in ("", None) for item in items):
        raise wrong
    hashable = all(isinstance(item, str | int | float) for item in items)
    return list(dict.fromkeys(items)) if hashable else items


def composed(words: Sequence[str]) -> Config:
    """Composes the one job that the words describe, without checks of its options.

    The job may name a network in a file of the current folder, so this makes it importable.
    """
    cli.import_from_current_folder()
    for flag in ("-m", "--multirun"):
        if flag in words:
            raise ConfigError(f"{flag}: not understood; this tool takes lists in place of sweeps")
    for word in words:
        if _is_sweep(word):
            raise ConfigError(f"{word}: not understood; this tool takes one value of each option")
    configs = cli.compose(words)
    if len(configs) != 1:  # a flag such as --cfg, with which hydra only shows something
        raise SystemExit(0)
    return configs[0]


def _is_sweep(word: str) -> bool:
    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except Exception:  # cli.compose reports the mistake
        return False
