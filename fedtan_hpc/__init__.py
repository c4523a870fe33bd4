"""FedTAN on many ranks: federated training with exact global batch normalization statistics.

For a training loop of your own: ``convert_batchnorm``, ``federated_statistics``,
``average_model``, and with several clients on a rank ``federated_backward`` and
``average_models``.  For a whole job: ``run`` with a ``Config``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .average import average_model, average_models
    from .batchnorm import (
        FedTANBatchNorm,
        convert_batchnorm,
        federated_backward,
        federated_statistics,
    )
    from .config import Config
    from .job import run
    from .metrics import Summary

__version__ = "0.2.0"

__all__ = [
    "Config",
    "FedTANBatchNorm",
    "Summary",
    "average_model",
    "average_models",
    "convert_batchnorm",
    "federated_backward",
    "federated_statistics",
    "run",
]

# Names are imported when they are first used: the command line checks options without torch.
_HOME = {
    "Config": "config",
    "FedTANBatchNorm": "batchnorm",
    "Summary": "metrics",
    "average_model": "average",
    "average_models": "average",
    "convert_batchnorm": "batchnorm",
    "federated_backward": "batchnorm",
    "federated_statistics": "batchnorm",
    "run": "job",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
