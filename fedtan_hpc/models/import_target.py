"""A network of the user's own, by ``package.module:callable``."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import nn

from ..config.errors import ConfigError, format_option_error, one_line


def build(target: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    """What ``target`` makes, called with those of ``shape`` and ``classes`` that it has a name for.

    ``shape`` is that of a sample, (C, H, W).

    Raises ``ConfigError`` if it cannot be imported or called, or makes no module.
    """
    make = _resolve(target)
    try:
        module = make(**_named_by(make, {"shape": shape, "classes": classes}))
    except (Exception, SystemExit) as error:
        allowed = f"a callable that makes a network for shape={shape}, classes={classes}"
        line = format_option_error("model.target", target, allowed, f"it raised {one_line(error)}")
        raise ConfigError(line) from error
    if not isinstance(module, nn.Module):
        allowed = "a callable that returns a torch.nn.Module"
        line = format_option_error(
            "model.target", target, allowed, f"it returned a {type(module).__name__}"
        )
        raise ConfigError(line)
    return module


def _resolve(target: str) -> Callable[..., Any]:
    try:
        found = pkgutil.resolve_name(target)
    except (Exception, SystemExit) as error:
        allowed = "package.module:callable, found on PYTHONPATH"
        line = format_option_error("model.target", target, allowed, one_line(error))
        raise ConfigError(line) from error
    if not callable(found) or isinstance(found, nn.Module):
        remedy = f"this is a {type(found).__name__}, not something that makes a network"
        raise ConfigError(format_option_error("model.target", target, "a callable", remedy))
    return found  # type: ignore[no-any-return]


def _named_by(make: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of ``offered`` that ``make`` takes by name."""
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:  # some callables in C have none
        return {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: value
        for name, value in offered.items()
        if name in parameters and parameters[name].kind in by_name
    }
