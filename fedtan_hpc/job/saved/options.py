"""The options of an earlier run, as its folder or a checkpoint has them, with types checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ...config.enums import ModelSource
from ...config.errors import one_line
from ...config.schema import Config, to_dict
from ...files import reading
from ...files.reading import unusable


def read(path: Path) -> dict[str, Any]:
    """Returns the options in a YAML file, with defaults for those that it lacks.

    Raises ``FileNotFoundError`` and ``reading.FileError``.
    """
    return checked(reading.read_yaml(path), path)


def checked(saved: Any, path: Path) -> dict[str, Any]:
    """Returns ``completed(saved)``; raises ``FileError`` if a value has not its option's type.

    ``path`` is the file that has the options.  Options that only another version has may be there.
    """
    try:
        options = completed(saved)
        known = _known(options, to_dict(Config()))
        OmegaConf.merge(OmegaConf.structured(Config), known)  # checks types, resolves nothing
    except Exception as error:  # OmegaConf raises many kinds, assertions too
        raise unusable(path, f"its options are none of a run ({one_line(error)})") from error
    return options


def completed(saved: Any) -> dict[str, Any]:
    """Returns ``saved`` options with the defaults of those that an older version did not have.

    Raises ``TypeError`` if they are no mapping, or a group is none.
    """
    options = _merged(to_dict(Config()), saved)
    if options["model"]["source"] == "target":  # in version 0.2
        options["model"]["source"] = str(ModelSource.import_)
    return options


def _merged(defaults: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**defaults, **saved}
    for name, value in merged.items():
        if isinstance(default := defaults.get(name), dict):
            if not isinstance(value, dict):
                raise TypeError(f"{name} is {repr(value)[:80]}, not a group")
            merged[name] = _merged(default, value)
    return merged


def _known(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out options that this version does not have."""
    known = {name: value for name, value in options.items() if name in defaults}
    for name, value in known.items():
        if isinstance(defaults[name], dict) and name != "options":
            known[name] = _known(value, defaults[name])
    return known
