"""What every option means, which values it takes and its default, from the fields of ``Config``."""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from . import hydra_errors
from .schema import Config, to_dict


class Entry(NamedTuple):
    """An option by its dotted name."""

    option: str
    default: str
    allowed: str
    meaning: str


def entries(schema: type[Config] = Config) -> Iterator[Entry]:
    """All options in the order of ``schema``."""
    defaults = to_dict(schema())
    for option, meaning in _meanings(schema):
        value: Any = defaults
        for name in option.split("."):
            value = value[name]
        default = "null" if value is None else str(value)
        yield Entry(option, default, hydra_errors.allowed(option, schema), meaning)


def text(schema: type[Config] = Config) -> str:
    """For a terminal: name and default, values and meaning below them."""
    width = min(100, shutil.get_terminal_size().columns)
    lines = []
    for entry in entries(schema):
        about = f"[{entry.allowed}] {entry.meaning}"
        indent = " " * 6
        lines.append(f"  {entry.option}={entry.default}")
        lines.append(textwrap.fill(about, width, initial_indent=indent, subsequent_indent=indent))
    return "\n".join(lines)


def _meanings(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every option's dotted name and the docstring below its field."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        texts |= _docstrings(base)
    hints = get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            yield from _meanings(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, texts[field.name]


def _docstrings(cls: type[Any]) -> dict[str, str]:
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found
