"""Print the README's table of options, made from the fields of ``fedtan_hpc/config.py``.

python tools/options_table.py
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from fedtan_hpc import explain
from fedtan_hpc.config import Config, to_dict


def main() -> None:
    """Print the table."""
    print("\n".join(rows()))


def rows() -> Iterator[str]:
    """The lines of the table in Markdown."""
    yield "| option | default | allowed | meaning |"
    yield "| --- | --- | --- | --- |"
    defaults = to_dict(Config())
    for option, meaning in meanings(Config):
        value: Any = defaults
        for name in option.split("."):
            value = value[name]
        default = "null" if value is None else str(value)
        allowed = explain.allowed(option).replace("|", "\\|")
        yield f"| `{option}` | `{default}` | {allowed} | {meaning} |"


def meanings(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every option's dotted name and the docstring below its field."""
    texts = _docstrings(cls)
    hints = get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            yield from meanings(hints[field.name], f"{prefix}{field.name}.")
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


if __name__ == "__main__":
    main()
