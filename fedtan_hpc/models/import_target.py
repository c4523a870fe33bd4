"""A network of the user, imported as ``package.module:callable``.  Used by ``factory``."""

from typing import Any

from torch import nn

from ..config.errors import ConfigError, format_option_error, one_line
from ..runtime.import_path import accepted, resolve


def build(target: str, shape: Any, classes: int) -> nn.Module:
    """Calls ``target`` with those of ``shape`` and ``classes`` that it takes by name.

    ``shape`` is that of a sample, such as (C, H, W); for samples that are a dict or a tuple of
    tensors it is a dict or a tuple of shapes.

    Raises ``ConfigError`` if it cannot be imported or called, or does not return a module.
    """
    make = resolve("model.target", target, "a network")
    try:
        module = make(**accepted(make, {"shape": shape, "classes": classes}))
    except (Exception, SystemExit) as error:
        allowed = f"a callable that makes a network for shape={shape}, classes={classes}"
        raise _error(target, allowed, f"it raised {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        allowed = "a callable that returns a torch.nn.Module"
        raise _error(target, allowed, f"it returned a {type(module).__name__}")
    return module


def _error(target: str, allowed: str, remedy: str) -> ConfigError:
    return ConfigError(format_option_error("model.target", target, allowed, remedy))
