"""Compares values from a file with the types that a dataclass gives to its fields."""

import math
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_MOST = 2**63
"""Whole numbers of a run are below it."""


def misfit(kind: type, values: Mapping[str, Any]) -> str:
    """Returns what is wrong with ``values`` as fields of the dataclass ``kind``; empty if nothing.

    Fields that have defaults may be absent; names that are no fields do not count.
    """
    hints = _hints(kind)
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            return f"{name} is {repr(value)[:80]}, not of the kind {_named(hints[name])}"
    return ""


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {each.name: hints[each.name] for each in fields(kind)}


def _named(hint: Any) -> str:
    return getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint)


def fits(value: Any, hint: Any) -> bool:
    """Returns whether ``value`` is of the type ``hint``.

    Whole numbers are counts: not negative, not above 2^63, and no bool.  Floats are finite.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(each, arguments[0]) for each in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(
            fits(key, arguments[0]) and fits(each, arguments[1]) for key, each in value.items()
        )
    return _is_plain(value, hint)


def _is_plain(value: Any, hint: Any) -> bool:
    if hint in (None, NoneType):
        return value is None
    if hint is int:
        return type(value) is int and 0 <= value < _MOST
    if hint is float:
        return type(value) in (int, float) and abs(value) < _MOST**8 and math.isfinite(value)
    return isinstance(value, hint)
