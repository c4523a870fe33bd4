"""The only import of torchvision, made when a network or a data set needs it."""

import importlib
import sys
from types import ModuleType

import torch

from ..config.errors import ConfigError, format_option_error, one_line

_declarations: list[torch.library.Library] = []
"""Declared operators exist as long as these objects do."""


def import_torchvision() -> ModuleType:
    """Imports torchvision, without its compiled operators if they do not fit this torch.

    Raises ``ConfigError`` if torchvision is missing or does not work.
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


def _declare_operators() -> None:
    """Declares the two operators that torchvision extends when it is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declarations.append(library)
