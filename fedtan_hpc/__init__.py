"""FedTAN on many ranks: federated training with exact global batch normalization statistics.

For a training loop of your own: ``convert_batchnorm``, ``federated_statistics``,
``average_model``, and with several clients on a rank ``federated_backward`` and
``average_models``.  For a whole job: ``run`` with a ``Config``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batchnorm.context import federated_backward, federated_statistics
    from .batchnorm.layer import FedTANBatchNorm, convert_batchnorm
    from .config.schema import Config
    from .distributed.model_average import average_model, average_models
    from .evaluation.records import Summary
    from .job.run import run

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
    "Config": "config.schema",
    "FedTANBatchNorm": "batchnorm.layer",
    "Summary": "evaluation.records",
    "average_model": "distributed.model_average",
    "average_models": "distributed.model_average",
    "convert_batchnorm": "batchnorm.layer",
    "federated_backward": "batchnorm.context",
    "federated_statistics": "batchnorm.context",
    "run": "job.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
