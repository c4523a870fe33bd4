"""Composes configurations from words and files, by hydra."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime, setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from yaml import YAMLError

from ..config import help, path_options
from ..config.errors import ConfigError, format_option_error
from ..config.hydra_errors import explain, unknown, unreadable
from ..config.schema import Config
from ..runtime import launcher_env
from . import flags, hydra_options, sweep

Schema = TypeVar("Schema", bound=Config)

_LONG = 20
"""Number of points after which composing them takes seconds, and is told."""


def compose(words: Sequence[str] | None = None) -> list[Config]:
    """Returns the configurations of ``words``, by default the command line's; several with -m.

    The list is empty if a flag, such as --help, only shows something.  Raises ``ConfigError`` for
    options that do not exist or have the wrong type.
    """
    return compose_as(Config, "config", words)


def compose_as(
    schema: type[Schema], entry: str, words: Sequence[str] | None = None
) -> list[Schema]:
    """Does what ``compose`` does, for another ``schema`` and its file ``entry`` of conf/."""
    words = sys.argv[1:] if words is None else list(words)
    _refuse_deletions(words)
    if topics := [word.partition("=")[2] for word in words if word.startswith("--help=")]:
        text = help.topic(topics[0], schema)
        if launcher_env.rank_hint() == 0:
            print(text)
        return []
    # By default hydra prints several lines and exits with 1; with this it raises instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ConfigStore.instance().store(name="schema", node=schema)
    for part in (help.choices, help.overview):  # of the template of --help in conf/config.yaml
        OmegaConf.register_new_resolver(part.__name__, partial(part, schema), replace=True)
    given = flags.parse(path_options.quoted(words))
    loader = _loader(given.config_dir)
    with _explained(words, schema, partial(_composes, loader, given.config_name or entry)):
        overrides = sweep.parsed(given.options, loader)
        hydra_options.check_words(overrides)
        if not given.sweeps:
            sweep.refuse(overrides)
        if given.shows:
            flags.show(given, entry, _conf())
            return []
        composing = _Composing(loader, given.config_name or entry, schema)
        return composing.all(given.options) if given.sweeps else [composing.one(given.options)]


class _Composing:
    """Composes points from one file and different words."""

    def __init__(self, loader: ConfigLoaderImpl, config_name: str, schema: type[Any]) -> None:
        self._loader, self._name, self._schema = loader, config_name, schema

    def one(self, words: Sequence[str]) -> Any:
        """Returns the configuration of ``words``, which sweep over nothing."""
        return self._checked(self._composed(words))

    def all(self, words: Sequence[str]) -> list[Any]:
        """Returns the configuration of each point of a sweep, in their order."""
        points = self._points(words)
        first = self._composed(points[0])
        if params := first.hydra.sweeper.params:  # a sweep that a file describes
            points = self._points([*(f"{key}={value}" for key, value in params.items()), *words])
            first = self._composed(points[0])
        if len(points) > _LONG and launcher_env.rank_hint() == 0:
            print(f"composing {len(points)} points", file=sys.stderr, flush=True)
        configs = [self._checked(first, 0)]
        for number, point in enumerate(points[1:], 1):
            configs.append(self._checked(self._composed(point), number))
        return configs

    def _points(self, words: Sequence[str]) -> list[list[str]]:
        return sweep.points(sweep.parsed(words, self._loader))

    def _composed(self, words: Sequence[str]) -> DictConfig:
        return self._loader.load_configuration(self._name, list(words), RunMode.RUN)

    def _checked(self, composed: DictConfig, number: int = 0) -> Any:
        """Returns the configuration; ``number`` is that of the point, ``${hydra:job.num}``."""
        if OmegaConf.get_type(composed) is not self._schema:
            remedy = 'begin that file with "defaults: [config, _self_]"'
            allowed = "a file with the package's options"
            raise ConfigError(format_option_error("--config-name", self._name, allowed, remedy))
        hydra_options.check_composed(composed)
        composed.hydra.job.num, composed.hydra.job.id = number, str(number)
        with _hydra_config(composed):
            with open_dict(composed):
                del composed["hydra"]
            return _to_config(composed, self._schema)


def _loader(config_dir: str | None) -> ConfigLoaderImpl:
    """Returns the reader of the package's files and of those in ``config_dir``, which come first.

    It is not hydra's global one: a program that uses hydra itself may call this.
    """
    version.setbase("1.3")
    setup_globals()
    OmegaConf.register_new_resolver("hydra", _value_of_hydra, use_cache=True, replace=True)
    JobRuntime.instance().set("name", "fedtan_hpc")
    path = create_config_search_path(f"file://{_conf()}")
    if config_dir is not None:
        folder = Path(config_dir).absolute()
        if not os.path.isdir(folder):
            allowed = "a folder with configuration files"
            raise ConfigError(format_option_error("--config-dir", config_dir, allowed, "name one"))
        path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(path)


@contextmanager
def _hydra_config(composed: DictConfig) -> Iterator[None]:
    """Lets ``${hydra:...}`` have values inside."""
    instance: Any = HydraConfig.instance()
    before = instance.cfg
    instance.cfg = composed.copy()
    try:
        yield
    finally:
        instance.cfg = before


def _value_of_hydra(name: str) -> Any:
    """Resolves ``${hydra:name}``; hydra's own resolver gives nothing for what has no value."""
    hydras: Any = HydraConfig.get()
    if (value := OmegaConf.select(hydras, name, throw_on_missing=True)) is None:
        raise ValueError(f"hydra's {name} has no value here")
    return value


@contextmanager
def _explained(
    words: Sequence[str], schema: type[Config], composes: Callable[[str], bool]
) -> Iterator[None]:
    """Turns whatever hydra raises into a ``ConfigError`` of one line, which names a word.

    ``composes`` says whether hydra takes a word alone: not every error of hydra names its cause.
    """
    try:
        yield
    except (ConfigError, BrokenPipeError):  # nobody reads what --help prints: no mistake
        raise
    except YAMLError as error:
        raise ConfigError(unreadable(error)) from error
    except Exception as error:  # words of users reach every corner of hydra, which checks few
        line = explain(error, words, schema)
        names = [word.partition("=")[0].lstrip("+") for word in words]
        if not any(name in line for name in names):
            options = [word for word in words if not word.startswith("-")]
            words = [word for word in options if not composes(word)][:1]
            line = "".join(f"{word}: not understood: " for word in words) + line
        raise ConfigError(line) from error


def _composes(loader: ConfigLoaderImpl, config_name: str, word: str) -> bool:
    try:
        first = sweep.points(sweep.parsed([word], loader))[0]
        _Composing(loader, config_name, Config).one(first)
    except Exception:
        return False
    return True


def _refuse_deletions(words: Sequence[str]) -> None:
    """Refuses ``~name``, after which the option would silently have its default."""
    how = "options cannot be removed; leave it out for its default, or give it a value"
    deletions = [word for word in words if word.startswith("~")]
    if deletions:
        raise ConfigError(*(f"{word}: {how}" for word in deletions))


def _conf() -> Path:
    """Returns the folder conf/: beside the package in a checkout, in the package in a wheel."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def _to_config(composed: DictConfig, schema: type[Schema]) -> Schema:
    if added := list(_added(composed, schema())):
        raise ConfigError(*(unknown(option, value, schema) for option, value in added))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, schema)
    return config


def _added(composed: DictConfig, schema: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Returns the options that ``+name=value`` added to those of the schema."""
    names = {field.name for field in fields(schema)}
    added: list[tuple[str, Any]] = []
    for key in composed:
        if key not in names:
            added.append((prefix + str(key), composed[key]))
        elif is_dataclass(group := getattr(schema, str(key))):
            added += _added(composed[key], group, f"{prefix}{key}.")
    return added
