"""Mistakes in the options of the network, as far as they show without torch."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from .enums import ModelName, ModelSource
from .errors import format_option_error
from .schema import Config

_LEAST_PIXELS = 4


def model_mistakes(config: Config) -> Iterator[str]:
    """One line for each."""
    yield from _target(config)
    if config.model.small_input and config.model.source is not ModelSource.torchvision:
        remedy = "leave it out or use model=torchvision"
        yield format_option_error(
            "model.small_input", "true", "false unless model=torchvision", remedy
        )
    if config.model.source is ModelSource.builtin:
        yield from _builtin(config)


def _target(config: Config) -> Iterator[str]:
    """Given with model=import, and only there."""
    target, is_import = config.model.target, config.model.source is ModelSource.target
    if target is not None and not is_import:
        remedy = "leave it out or use model=import"
        yield format_option_error("model.target", target, "null unless model=import", remedy)
    elif is_import and not _is_target(target or ""):
        given = "null" if target is None else target
        remedy = "for example model.target=my_networks:small_net"
        yield format_option_error("model.target", given, "package.module:callable", remedy)


def _is_target(text: str) -> bool:
    module, _, name = text.partition(":")
    return all(word.isidentifier() for path in (module, name) for word in path.split("."))


def _builtin(config: Config) -> Iterator[str]:
    """This package's networks."""
    name, names = config.model.name, [str(choice) for choice in ModelName]
    if name not in names:
        near = [f"use model={close}" for close in get_close_matches(name, names, n=1)]
        remedy = ", or ".join([*near, f"for torchvision's model=torchvision model.name={name}"])
        yield format_option_error("model.name", name, " | ".join(names), remedy)
        return
    shape = config.data.facts().shape
    if name != ModelName.mlp and len(shape) == 3 and min(shape[1:]) < _LEAST_PIXELS:
        allowed = f"{_LEAST_PIXELS} pixels or more each way with model={name}"
        yield format_option_error(
            "data.shape", list(shape), allowed, "use larger samples or model=mlp"
        )
