"""Turns errors of hydra and OmegaConf into one line each, and checks types of given options.

Used by the command line and, for options that are given from Python, by ``job.run``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from yaml import YAMLError

from .errors import ConfigError, format_option_error, printable, shown
from .help import UNGROUPED, allowed, entries, groups
from .schema import Config
from .validation.bounds import BOUNDS

_CHOOSE = "choose one of these"
_UNRESOLVED = (InterpolationResolutionError, UnsupportedInterpolationType)
_INTERPOLATION = (
    "the value of another option is written ${seed}, and the number of a point ${hydra:job.num} "
    "in a sweep (-m)"
)
_PACKAGE = "to set options of all groups, begin the file with the line # @package _global_"


def explain(error: Exception, overrides: Sequence[str], schema: type[Config] = Config) -> str:
    """Returns one line for ``error``, which composing the options from ``overrides`` raised."""
    cause: BaseException = error
    if not isinstance(error, OmegaConfBaseException | OverflowError):
        cause = error.__cause__ or error.__context__ or error
    if isinstance(error, MissingConfigException) and error.options is None:
        remedy = "write its name without .yaml"
        allowed_names = "a file in the folder that --config-dir names"
        return format_option_error("--config-name", error.missing_cfg_file, allowed_names, remedy)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return format_option_error(group, choice, " | ".join(sorted(error.options)), _CHOOSE)
    if file := re.match(r"In '(.+?)': ", str(error)):
        return f"{file[1]}.yaml: {_mistake_in_file(error, cause, schema)}"
    key = _key_of(cause)
    if key and not key.startswith("hydra."):
        if isinstance(cause, _UNRESOLVED):
            word = "=".join(_as_written(key, overrides))
            return f"{word}: not understood: {_first_line(cause)}; {_INTERPOLATION}"
        exists = key.partition(".")[0] in [field.name for field in fields(schema)]
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) or not exists:
            return unknown(*_as_written(key, overrides), schema)
        option = key.partition("[")[0]
        return _wrong_type(option, _as_written(option, overrides)[1], schema)
    return _null_group(overrides) or _first_line(error)


def unreadable(error: YAMLError) -> str:
    """Returns one line for a file that is not YAML."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"{mark.name}, line {mark.line + 1}" if mark else "a configuration file"
    return f"{where}: not valid YAML: {problem or ' '.join(str(error).split())}"


def typed(config: Config | Mapping[str, Any]) -> Config:
    """Returns ``config`` with every value converted to its option's type, such as text to a choice.

    ``config`` may be a dict or OmegaConf's DictConfig with some of the options.  Raises
    ``ConfigError`` for an option that does not exist, and for a value that cannot be converted.
    """
    if isinstance(config, Mapping):
        return _of_mapping(config)
    for field in fields(config):
        if is_dataclass(group := getattr(config, field.name)):
            _converted(group, f"{field.name}.")
    converted = _converted(config, "")
    assert isinstance(converted, Config)
    return converted


def _of_mapping(options: Mapping[str, Any]) -> Config:
    key: Any = ""
    given = OmegaConf.create()
    try:
        given = OmegaConf.create(dict(options)) if isinstance(options, dict) else options  # type: ignore[assignment]
        config: Any = OmegaConf.structured(Config())
        for key in given:
            config = OmegaConf.merge(config, OmegaConf.masked_copy(given, [key]))
        config = OmegaConf.to_object(config)
    except Exception as error:  # OmegaConf raises errors of many kinds
        key = str(getattr(error, "full_key", None) or key)
        key = f"{key}={_as_given(given, key)}"
        line = explain(error, [key])
        named = line if key.partition("=")[0] in line else f"{key}: not understood: {line}"
        raise ConfigError(named) from error
    assert isinstance(config, Config)
    return config


def _as_given(options: Any, key: str) -> Any:
    """Returns the value with a dotted name, or the first part of it, as it is written."""
    value: Any = OmegaConf.to_container(options, resolve=False)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else value
    return value


def unknown(option: str, value: object = None, schema: type[Config] = Config) -> str:
    """Returns one line for an option that does not exist, with similar names."""
    groups = [field.name for field in fields(schema)]
    names = [*(entry.option for entry in entries(schema)), *groups, "experiment"]
    last = option.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    near = sorted(same, key=lambda name: not name.startswith("optimizer."))
    near = near or get_close_matches(option, names, n=1)
    remedy = f"did you mean {' or '.join(near)}?" if near else "--help lists all options"
    option = printable(option, 200)
    given = option if value is None else f"{option}={shown(value)}"
    return f"{given}: no such option; {remedy}"


def _mistake_in_file(error: Exception, cause: BaseException, schema: type[Config]) -> str:
    option = str(getattr(cause, "full_key", None) or "")
    if option == "experiment" or "@experiment." in str(error):
        return f"its options would be those of experiment, which has none; {_PACKAGE}"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and option:
        return unknown(option, None, schema)
    if isinstance(cause, OmegaConfBaseException) and option:
        value = re.search(r"Value '(.*)' of type", str(cause))
        return _wrong_type(option, value[1] if value else "(its value)", schema)
    return str(error).partition(": ")[2].partition("\n")[0]


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _null_group(overrides: Sequence[str]) -> str:
    """Explains a group that is set to null, which hydra reports without naming the group."""
    for override in overrides:
        group, _, value = override.partition("=")
        if value == "null" and hasattr(getattr(Config(), group, None), "name"):
            return format_option_error(group, value, allowed(f"{group}.name"), _CHOOSE)
        if override == "experiment=null":
            remedy = "leave it out for none"
            return format_option_error(group, value, "a name that --help lists", remedy)
    return ""


def _converted(options: Any, prefix: str) -> Any:
    try:
        return OmegaConf.to_object(OmegaConf.structured(options))
    except Exception as error:  # values of any kind; OmegaConf notes the option in all of them
        name = _key_of(error).partition("[")[0] or _culprit(options)
        line = _wrong_type(prefix + name, _value_of(options, name))
        raise ConfigError(line) from error


def _key_of(error: BaseException) -> str:
    """Returns the dotted name of the option that OmegaConf noted in an exception; else nothing."""
    in_text = re.search(r"full_key: (\S+)", str(error))
    return str(getattr(error, "full_key", None) or (in_text[1] if in_text else ""))


def _culprit(options: Any) -> str:
    """Returns the name of the option that alone raises an exception without a name in it."""
    for field in fields(options):
        alone = type(options)()
        setattr(alone, field.name, getattr(options, field.name))
        try:
            OmegaConf.structured(alone)
        except Exception:
            return field.name
    return fields(options)[0].name


def _value_of(options: Any, name: str) -> object:
    """Returns the value of an option with a dotted name, or of the first part of it that exists."""
    for part in name.split("."):
        options = getattr(options, part, options)
    return options


def _wrong_type(option: str, value: object, schema: type[Config] = Config) -> str:
    digits = isinstance(value, int) or (isinstance(value, str) and value.lstrip("+-").isdecimal())
    if digits and option in BOUNDS:  # more of them than can be converted
        remedy = f"try {option}={BOUNDS[option].example}"
        return format_option_error(option, value, str(BOUNDS[option]), remedy)
    first = option.partition(".")[0]
    group = first if first in [group.name for group in groups(schema)] else UNGROUPED
    remedy = f"--help={group} says what it means"
    return format_option_error(option, value, allowed(option, schema), remedy)


def _as_written(option: str, overrides: Sequence[str]) -> tuple[str, str]:
    """Returns name and value as the command line has them, for ``option`` or an option below it."""
    for override in reversed(overrides):
        name, _, value = override.lstrip("+~").partition("=")
        if name == option or name.startswith(f"{option}."):
            return name, value
    return option, "?"
