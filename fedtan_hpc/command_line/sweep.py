"""The points of a sweep: how many there are, before they are listed, and the words of each."""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, prod

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep

from ..config.errors import ConfigError, shown

MOST_POINTS = 1000
"""Every point is composed and checked before the first one runs, in about half a second."""


def parsed(words: Sequence[str], loader: ConfigLoader) -> list[Override]:
    """Reads ``words`` by hydra's grammar; raises ``ConfigError`` naming those that it refuses."""
    parser = OverridesParser.create(config_loader=loader)
    overrides, mistakes = [], []
    for word in words:
        try:
            [override] = parser.parse_overrides([word])
            if not override.key_or_group:
                raise ValueError("a word without a name")
            overrides.append(override)
        except Exception:  # hydra's own error, or that of Python's conversion of a number
            mistakes.append(
                f"{shown(word)}: not understood; write option=value, for example rounds=20, "
                "and quote values with spaces or brackets for the shell"
            )
    if mistakes:
        raise ConfigError(*mistakes)
    return overrides


def refuse(overrides: Sequence[Override]) -> None:
    """Raises ``ConfigError`` if one of ``overrides``, those of a single configuration, sweeps."""
    remedy = "add -m to sweep over several, or put a text with commas in quotes of its own"
    swept = [override for override in overrides if override.is_sweep_override()]
    if swept:
        raise ConfigError(*(f"{each.input_line}: allowed is one value; {remedy}" for each in swept))


def points(overrides: Sequence[Override]) -> list[list[str]]:
    """Returns the words of each point, in the order in which the values are written.

    Raises ``ConfigError`` if there is none, or more than ``MOST_POINTS``.
    """
    swept = [override for override in overrides if override.is_sweep_override()]
    counts = {str(override.input_line): _count(override) for override in swept}
    if empty := [word for word, count in counts.items() if count == 0]:
        raise ConfigError(*(f"{word}: a sweep without a value; name one or more" for word in empty))
    if (number := prod(counts.values())) > MOST_POINTS:
        words, allowed = " ".join(counts), f"1 to {MOST_POINTS}"
        raise ConfigError(f"{words}: {number:.4g} points: allowed is {allowed}; sweep over fewer")
    return BasicSweeper.split_arguments(list(overrides), None)[0]


def _count(override: Override) -> int:
    value = override.value()
    if override.is_interval_sweep():
        remedy = "a sweep has single values, as in seed=0,1 or seed=range(0,5)"
        raise ConfigError(f"{override.input_line}: not understood; {remedy}")
    if getattr(value, "shuffle", False):
        # Each rank would shuffle by itself, and train at another point.
        remedy = "points run in the order in which they are written; leave shuffle out"
        raise ConfigError(f"{override.input_line}: not understood; {remedy}")
    if isinstance(value, ChoiceSweep):
        return len(value.list)
    if isinstance(value, RangeSweep):
        try:
            start, stop, step = (Fraction(each) for each in (value.start, value.stop, value.step))  # type: ignore[arg-type]
            return max(0, ceil((stop - start) / step))
        except (ArithmeticError, ValueError):
            remedy = "a range has finite numbers and a step that is not 0"
            raise ConfigError(f"{override.input_line}: not understood; {remedy}") from None
    return len(list(override.sweep_iterator()))
