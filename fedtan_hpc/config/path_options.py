"""Words of the command line that hydra would refuse or change: paths, and options of one's own.

Values of paths are quoted, and so taken as the shell hands them over; ``~`` is the home folder.
Below ``data.options`` and ``task.options`` any name is allowed.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

_PATHS = ("run_dir", "data.root", "resume", "launch.folder", "model.weights", "algorithm.probe_run")
_OPEN = ("data.options", "task.options")
"""The options whose names are the user's."""
_SWEEP_FLAGS = ("-m", "--multirun")


def quoted(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line as hydra needs them.

    The values of options that are paths are in quotes; options of the user's code have any name.

    Values in quotes, null and sweeps (a,b or choice(a,b)) stay; ``${...}`` keeps its meaning.  With
    -m commas separate paths also where hydra cannot read them.
    """
    is_sweep = any(flag in words for flag in _SWEEP_FLAGS)
    return [_quoted_word(word, is_sweep) for word in words]


def expanded(path: str) -> Path:
    """Returns ``path`` with ``~`` or ``~user`` as that user's home folder, if there is such."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _quoted_word(word: str, may_sweep: bool) -> str:
    name, equals, value = word.partition("=")
    if ".".join(name.split(".")[:2]) in _OPEN:
        return f"++{word}"
    if name.lstrip("+") not in _PATHS or not equals or value in ("", "null") or _has_quotes(value):
        return word
    try:
        if OverridesParser.create().parse_override(word).is_sweep_override():
            return word
    except (HydraException, ValueError):  # Python refuses numbers of thousands of digits
        if may_sweep:
            return f"{name}={','.join(_in_quotes(path.strip()) for path in value.split(','))}"
    return f"{name}={_in_quotes(value)}"


def _has_quotes(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def _in_quotes(value: str) -> str:
    """Returns ``value`` as hydra's quoted text; backslashes count double only before a quote."""
    if _has_quotes(value):
        return value
    escaped = re.sub(
        r"(\\*)('|$)", lambda found: 2 * found[1] + found[2].replace("'", r"\'"), value
    )
    return f"'{escaped}'"
