"""The user's own code, imported as ``package.module:callable``.

Used by ``data``, ``models`` and ``job``.
"""

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import nn

from ..config.errors import ConfigError, format_option_error, one_line
from .torchvision_import import import_torchvision


def resolve(
    option: str, target: str, product: str, may_be_module: bool = False
) -> Callable[..., Any]:
    """Imports the callable ``target``, a value of ``option``; it makes ``product``, in words.

    A module of torch is no such callable, unless it ``may_be_module``.

    Raises ``ConfigError`` if the import fails or finds no callable.
    """
    try:
        resolved = _found(target)
    except (Exception, SystemExit) as error:
        allowed = "package.module:callable, found on PYTHONPATH"
        raise ConfigError(format_option_error(option, target, allowed, one_line(error))) from error
    if not callable(resolved) or (isinstance(resolved, nn.Module) and not may_be_module):
        remedy = f"this is a {type(resolved).__name__}, not something that makes {product}"
        raise ConfigError(format_option_error(option, target, "a callable", remedy))
    return resolved  # type: ignore[no-any-return]


def _found(target: str) -> Any:
    """Imports ``target``; what it needs of torchvision may lack operators that fit this torch."""
    try:
        return pkgutil.resolve_name(target)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    import_torchvision()
    return pkgutil.resolve_name(target)


def accepted(make: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns those of ``arguments`` that ``make`` takes by name."""
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:  # some callables in C have no signature
        return {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {name for name, parameter in parameters.items() if parameter.kind in by_name}
    return {name: value for name, value in arguments.items() if name in names}
