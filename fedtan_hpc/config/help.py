"""Describes every option in words: default, allowed values and meaning, from the fields of Config.

Used by ``--help``, by docs/options.md and by error messages.
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

from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType

from .errors import ConfigError, format_option_error
from .schema import Config
from .schema_training import WORDS

_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_LISTS = {
    str: "a list of texts such as [a,b]",
    int: "a list of whole numbers such as [1,2]",
    float: "a list of numbers such as [0.9,0.99]",
}
UNGROUPED = "run"
"""The name under which help has the options that belong to no group."""
_OF_UNGROUPED = "Sets clients, rounds, batches, evaluation, device and files."
_INDENT = 17
"""Columns before the text that describes a group."""


class Entry(NamedTuple):
    """The description of one option; ``option`` is its dotted name."""

    option: str
    default: str
    allowed: str
    meaning: str


class Group(NamedTuple):
    """The description of a group of options; ``purpose`` is a sentence about the group."""

    name: str
    purpose: str
    entries: list[Entry]


def groups(schema: type[Any] = Config) -> list[Group]:
    """Returns the options of ``schema`` by group; those without a group stand first, as ``run``."""
    nested = {name: hint for name, hint in get_type_hints(schema).items() if is_dataclass(hint)}
    return [
        Group(UNGROUPED, _OF_UNGROUPED, list(_entries(schema, ""))),
        *(
            Group(name, " ".join(str(hint.__doc__).split()), list(_entries(hint, f"{name}.")))
            for name, hint in nested.items()
        ),
    ]


def entries(schema: type[Any] = Config) -> Iterator[Entry]:
    """Yields all options of ``schema``, group by group."""
    for group in groups(schema):
        yield from group.entries


def _entries(schema: Any, prefix: str) -> Iterator[Entry]:
    """Yields the options of one dataclass without those of its groups."""
    defaults, hints, meanings = schema(), get_type_hints(schema), _docstrings(schema)
    for field in fields(schema):
        if not is_dataclass(hint := hints[field.name]):
            default = _as_yaml(getattr(defaults, field.name))
            words = field.metadata.get(WORDS) or _in_words(hint)
            yield Entry(prefix + field.name, default, words, meanings[field.name])


def choices(schema: type[Any] = Config) -> str:
    """Returns the part of ``--help`` with the choices of each group; hydra calls this.

    Choices are YAML files of conf/ and of the user's ``--config-dir``.
    """
    loader = GlobalHydra.instance().config_loader()
    names = [field.name for field in fields(schema)]
    found = {
        name: sorted(loader.get_group_options(name, ObjectType.CONFIG))
        for name in sorted(loader.list_groups(""))
        if name in names or name == "experiment"
    }
    return "\n".join(_paragraph(name, ", ".join(files)) for name, files in found.items())


def overview(schema: type[Any] = Config) -> str:
    """Returns the part of ``--help`` with purpose and option names of each group."""
    return "\n".join(
        _paragraph(group.name, f"{group.purpose} {_names(group)}") for group in groups(schema)
    )


def topic(name: str, schema: type[Any] = Config) -> str:
    """Returns what ``--help=name`` prints: all about the options of a group, or of ``all`` groups.

    Raises ``ConfigError`` if there is no such group.
    """
    known = {group.name: group for group in groups(schema)}
    if name not in ("all", *known):
        allowed = " | ".join(["all", *known])
        raise ConfigError(format_option_error("--help", name, allowed, "choose one of these"))
    shown = known.values() if name == "all" else [known[name]]
    return "\n\n".join(f"{group.name}: {group.purpose}\n\n{_in_full(group)}" for group in shown)


def _names(group: Group) -> str:
    return ", ".join(entry.option.rpartition(".")[2] for entry in group.entries)


def _in_full(group: Group) -> str:
    lines = []
    for entry in group.entries:
        lines.append(f"  {entry.option}={entry.default}")
        lines.append(_filled(f"[{entry.allowed}] {entry.meaning}", " " * 6, " " * 6))
    return "\n".join(lines)


def _paragraph(head: str, text: str) -> str:
    return _filled(text, f"  {head}".ljust(_INDENT), " " * _INDENT)


def _filled(text: str, first_indent: str, indent: str) -> str:
    """Returns ``text`` in lines as wide as the terminal allows."""
    width = min(100, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, initial_indent=first_indent, subsequent_indent=indent)


def allowed(option: str, schema: type[Any] = Config) -> str:
    """Returns the values that the type of ``option`` allows, in words."""
    hint: Any = schema
    for name in option.split("."):
        if is_dataclass(hint):  # and not a mapping, whose names are the user's
            [field] = [each for each in fields(hint) if each.name == name]
            if words := field.metadata.get(WORDS):
                return str(words)
            hint = get_type_hints(hint)[name]
    if is_dataclass(hint):
        return f"set through its own options, such as {option}.{fields(hint)[0].name}"
    return _in_words(hint)


def _as_yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def _in_words(hint: Any) -> str:
    if isinstance(hint, EnumMeta):
        return " | ".join(str(choice) for choice in hint)  # type: ignore[var-annotated]
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(part) for part in get_args(hint))
    if get_origin(hint) is list:
        [kind] = get_args(hint)
        if isinstance(kind, EnumMeta):
            return f"a list such as [a,b] of {_in_words(kind)}"
        return _LISTS[kind]
    if get_origin(hint) is dict:
        return "names with values such as {a: 1, b: text}"
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
