"""Describes every option in words: default, allowed values and meaning, from the fields of Config.

Used by ``--help``, by the README's table of options and by error messages.
"""

import ast
import inspect
import shutil
import textwrap
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import EnumMeta
from itertools import pairwise
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from .schema import Config

_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Entry(NamedTuple):
    """The description of one option; ``option`` is its dotted name."""

    option: str
    default: str
    allowed: str
    meaning: str


def entries(schema: Any = Config, prefix: str = "") -> Iterator[Entry]:
    """Yields all options of ``schema`` in order; their names begin with ``prefix``."""
    defaults, hints, meanings = schema(), get_type_hints(schema), _docstrings(schema)
    for field in fields(schema):
        option, hint = prefix + field.name, hints[field.name]
        if is_dataclass(hint):
            yield from entries(hint, f"{option}.")
        else:
            default = getattr(defaults, field.name)
            default = "null" if default is None else str(default)
            yield Entry(option, default, _in_words(hint), meanings[field.name])


def text(schema: type[Any] = Config) -> str:
    """Returns the part of ``--help`` that lists the options, as wide as the terminal allows."""
    width = min(100, shutil.get_terminal_size().columns)
    lines = []
    for entry in entries(schema):
        about = f"[{entry.allowed}] {entry.meaning}"
        indent = " " * 6
        lines.append(f"  {entry.option}={entry.default}")
        lines.append(textwrap.fill(about, width, initial_indent=indent, subsequent_indent=indent))
    return "\n".join(lines)


def allowed(option: str, schema: type[Any] = Config) -> str:
    """Returns the values that the type of ``option`` allows, in words."""
    hint: Any = schema
    for name in option.split("."):
        hint = get_type_hints(hint)[name]
    if is_dataclass(hint):
        return f"set through its own options, such as {option}.{fields(hint)[0].name}"
    return _in_words(hint)


def _in_words(hint: Any) -> str:
    if isinstance(hint, EnumMeta):
        return " | ".join(str(choice) for choice in hint)  # type: ignore[var-annotated]
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(part) for part in get_args(hint))
    if get_origin(hint) is list:
        texts = get_args(hint) == (str,)
        return "a list of texts such as [a,b]" if texts else "a list of whole numbers such as [1,2]"
    return "null" if hint is type(None) else _PLAIN[hint]


def _docstrings(schema: type[Any]) -> dict[str, str]:
    """Returns the docstring below each field; a dataclass does not keep them, so parses source."""
    meanings = {}
    for cls in reversed(schema.__mro__[:-1]):
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                meanings[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return meanings
