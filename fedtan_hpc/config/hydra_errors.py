"""hydra's and OmegaConf's errors, told as the option, the value, what is allowed and the remedy."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import EnumMeta
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from .errors import ConfigError, format_option_error
from .schema import Config

_PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


def explain(error: Exception, overrides: Sequence[str], schema: type[Config] = Config) -> str:
    """One line for an error of composing the options from ``overrides``."""
    cause: BaseException = error
    if not isinstance(error, OmegaConfBaseException):
        cause = error.__cause__ or error.__context__ or error
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return format_option_error(
            group, choice, " | ".join(sorted(error.options)), "choose one of these"
        )
    if place := re.match(r"In '(.+?)': ", str(error)):
        return f"{place[1]}.yaml: {_in_file(error, cause, schema)}"
    if isinstance(error, OverrideParseException):
        text = f"{error.override}: not understood; write option=value, for example rounds=20, "
        return text + "and quote values with spaces or brackets for the shell"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return unknown(*_as_written(str(cause.full_key), overrides), schema)
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        option = str(cause.full_key).partition("[")[0]
        remedy = "see the options table of the README, or --help"
        return format_option_error(
            option, _as_written(option, overrides)[1], allowed(option, schema), remedy
        )
    for override in overrides:
        group, _, value = override.partition("=")
        if value == "null" and f"{group}.name" in option_names(schema):
            return format_option_error(
                group, value, allowed(f"{group}.name"), "choose one of these"
            )
        if override == "experiment=null":
            return format_option_error(
                group, value, "a name that --help lists", "leave it out for none"
            )
    first = str(error).partition("\n")[0]
    return f"{first}; values apart by commas are a sweep, with -m first" if "," in first else first


def unreadable(error: YAMLError) -> str:
    """One line for a file that is not YAML."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"{mark.name}, line {mark.line + 1}" if mark else "a configuration file"
    return f"{where}: no YAML: {problem or ' '.join(str(error).split())}"


def _in_file(error: Exception, cause: BaseException, schema: type[Config]) -> str:
    """What is wrong in a YAML file of one's own."""
    option = str(getattr(cause, "full_key", None) or "")
    package = "to set options of all groups, begin the file with the line # @package _global_"
    if option == "experiment" or "@experiment." in str(error):
        return f"its options would be those of experiment, which has none; {package}"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and option:
        return unknown(option, None, schema)
    if isinstance(cause, OmegaConfBaseException) and option:
        value = re.search(r"Value '(.*)' of type", str(cause))
        remedy = "see the options table of the README, or --help"
        found = value[1] if value else "(its value)"
        return format_option_error(option, found, allowed(option, schema), remedy)
    return str(error).partition(": ")[2].partition("\n")[0]


def typed(config: Config) -> Config:
    """``config`` with every value of its option's type: a choice given as text becomes a choice.

    Raises ``ConfigError`` for values that have no such meaning.
    """
    groups = {field.name: getattr(config, field.name) for field in fields(config)}
    for name, group in groups.items():
        if is_dataclass(group):
            _structured(group, f"{name}.")
    checked = OmegaConf.to_object(_structured(config, ""))
    assert isinstance(checked, Config)
    return checked


def _structured(options: Any, prefix: str) -> Any:
    try:
        return OmegaConf.structured(options)
    except OmegaConfBaseException as error:
        name = str(error.full_key or "").partition("[")[0]
        value, remedy = getattr(options, name, "?"), "see the options table of the README"
        line = format_option_error(prefix + name, value, allowed(prefix + name), remedy)
        raise ConfigError(line) from error


def unknown(option: str, value: object = None, schema: type[Config] = Config) -> str:
    """One line for an option that does not exist."""
    groups = [field.name for field in fields(schema)]
    names = [*option_names(schema), *groups, "experiment"]
    last = option.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    near = sorted(same, key=lambda name: not name.startswith("optimizer."))
    near = near or get_close_matches(option, names, n=1)
    remedy = f"did you mean {' or '.join(near)}?" if near else "--help lists all options"
    given = option if value is None else f"{option}={value}"
    return f"{given}: no such option; {remedy}"


def allowed(option: str, schema: type[Config] = Config) -> str:
    """What the option's type admits, in words."""
    cls: Any = schema
    for name in option.split("."):
        cls = get_type_hints(cls)[name]
    if is_dataclass(cls):
        return f"set through its own options, such as {option}.{fields(cls)[0].name}"
    return _in_words(cls)


def option_names(cls: Any = Config, prefix: str = "") -> Iterator[str]:
    """All options by their dotted names."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            yield from option_names(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _in_words(kind: Any) -> str:
    if isinstance(kind, EnumMeta):
        return " | ".join(str(choice) for choice in kind)  # type: ignore[var-annotated]
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_in_words(part) for part in get_args(kind))
    if get_origin(kind) is list:
        texts = get_args(kind) == (str,)
        return "a list of texts such as [a,b]" if texts else "a list of whole numbers such as [1,2]"
    return _PLAIN[kind]


def _as_written(option: str, overrides: Sequence[str]) -> tuple[str, str]:
    """The option, or the one within it, that the command line sets, and its value there."""
    for override in reversed(overrides):
        name, _, value = override.lstrip("+~").partition("=")
        if name == option or name.startswith(f"{option}."):
            return name, value
    return option, "?"
