"""A tool's own options beside those of a job, all written as hydra's words (name=value)."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from .. import cli
from ..config.errors import ConfigError, format_option_error
from ..config.schema import Config
from ..runtime import launcher_env

sys.path.insert(1, os.getcwd())  # for networks of one's own, as in python -m fedtan_hpc


def shows_help(words: Sequence[str], text: str | None) -> bool:
    """Whether the words ask for help: then rank 0 prints the tool's ``text``."""
    asked = bool({"--help", "-h"} & set(words))
    if asked and launcher_env.rank_hint() == 0:
        print((text or "").strip())
    return asked


def check_plotting() -> None:
    """Raise ``ConfigError`` where there is nothing to draw with, before any work is done."""
    if find_spec("matplotlib") is None:
        raise ConfigError("matplotlib is not installed: pip install 'fedtan_hpc[plot]'")


def split(words: Sequence[str], own: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The tool's ``own`` options by name, as written, and the job's words in their order."""
    found: dict[str, str] = {}
    rest = []
    for word in words:
        name, equals, _ = word.partition("=")
        if name in own and equals:
            found[name] = word
        elif name.lstrip("+~") in own:
            raise ConfigError(f"{word}: not understood; write {name.lstrip('+~')}=value")
        else:
            rest.append(word)
    return found, rest


def choice(words: Sequence[str], group: str) -> str | None:
    """What the words say last for a group, if anything."""
    said = [word.partition("=")[2] for word in words if word.partition("=")[0] == group]
    return said[-1] if said else None


def folder(word: str) -> str:
    """The path that ``out=path`` names."""
    name, _, path = word.partition("=")
    if not path.strip():
        raise ConfigError(
            format_option_error(name, path, "the name of a file or folder", "name it")
        )
    return path


def check_writable(path: Path) -> None:
    """Raise ``ConfigError`` where no file can be made at ``path``, before any work is done."""
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "a folder" if path.is_dir() else "not writable")


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Trouble with writing there is a mistake in ``out``."""
    try:
        yield
    except OSError as error:
        remedy = f"choose another ({error.strerror})"
        raise ConfigError(
            format_option_error("out", path, "a place that can be written", remedy)
        ) from error


def values(word: str, example: str) -> list[Any]:
    """The values of ``name=[a,b]``, also written ``name=a`` or ``name=a,b`` or as a range."""
    name, _, text = word.partition("=")
    wrong = ConfigError(format_option_error(name, text, "a list", f"for example {name}={example}"))
    try:
        parsed = OverridesParser.create().parse_override(word)
        found: Any = list(parsed.sweep_iterator()) if parsed.is_sweep_override() else parsed.value()
    except HydraException as error:
        raise wrong from error
    found = found if isinstance(found, list) else [found]
    if not found or any(value in ("", None) for value in found):
        raise wrong
    return list(dict.fromkeys(found)) if all(map(_is_plain, found)) else found


def composed(words: Sequence[str]) -> Config:
    """The one job that the words describe; not checked yet."""
    for flag in ("-m", "--multirun"):
        if flag in words:
            raise ConfigError(f"{flag}: not understood; this tool takes lists in place of sweeps")
    for word in words:
        if _is_sweep(word):
            raise ConfigError(f"{word}: not understood; this tool takes one value of each option")
    configs = cli.compose(words)
    if len(configs) != 1:  # a flag by which hydra shows something
        raise SystemExit(0)
    return configs[0]


def _is_sweep(word: str) -> bool:
    """Whether hydra would take the values apart by commas."""
    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:  # told better when all is composed
        return False


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)
