"""torchvision, imported here alone and only when something of it is needed."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from ..config.errors import ConfigError, format_option_error, one_line


def import_torchvision() -> ModuleType:
    """torchvision; a copy whose compiled operators do not fit this torch does for all but those.

    Raises ``ConfigError`` if there is none that works.
    """
    try:
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
        _declare_operators()
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        allowed = f"one that fits torch {torch.__version__} ({one_line(error)})"
        remedy = "pip install torchvision, or choose what does without it"
        raise ConfigError(format_option_error("torchvision", "missing", allowed, remedy)) from None


_declared: list[torch.library.Library] = []
"""Declarations last as long as these objects do."""


def _declare_operators() -> None:
    """Name the two operators that torchvision wants to extend when it is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
