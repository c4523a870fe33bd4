"""A network of the user, imported as ``package.module:callable``.

Used by ``factory``; ``job.callbacks`` imports callbacks in the same way.
"""

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import nn

from ..config.errors import ConfigError, format_option_error, one_line


def build(target: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Calls ``target`` with those of ``shape`` (C, H, W) and ``classes`` that it takes by name.

    Raises ``ConfigError`` if it cannot be imported or called, or does not return a module.
    """
    make = resolve("model.target", target, "a network")
    try:
        module = make(**_accepted(make, {"shape": shape, "classes": classes}))
    except (Exception, SystemExit) as error:
        allowed = f"a callable that makes a network for shape={shape}, classes={classes}"
        raise _error(target, allowed, f"it raised {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        allowed = "a callable that returns a torch.nn.Module"
        raise _error(target, allowed, f"it returned a {type(module).__name__}")
    return module


def resolve(option: str, target: str, product: str) -> Callable[..., Any]:
    """Imports the callable ``target``, a value of ``option``; it makes ``product``, in words.

    Raises ``ConfigError`` if the import fails or finds no callable.
    """
    try:
        resolved = pkgutil.resolve_name(target)
    except (Exception, SystemExit) as error:
        allowed = "package.module:callable, found on PYTHONPATH"
        raise ConfigError(format_option_error(option, target, allowed, one_line(error))) from error
    if not callable(resolved) or isinstance(resolved, nn.Module):
        remedy = f"this is a {type(resolved).__name__}, not something that makes {product}"
        raise ConfigError(format_option_error(option, target, "a callable", remedy))
    return resolved  # type: ignore[no-any-return]


def _accepted(make: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:  # some callables in C have no signature
        return {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {name for name, parameter in parameters.items() if parameter.kind in by_name}
    return {name: value for name, value in arguments.items() if name in names}


def _error(target: str, allowed: str, remedy: str) -> ConfigError:
    return ConfigError(format_option_error("model.target", target, allowed, remedy))
