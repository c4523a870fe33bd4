"""fedtan_hpc trains one network on many clients' data, with exact global batch normalization
statistics.

For your training loop: ``convert_batchnorm``, ``federated_statistics``, ``average_model``, and with
several clients on a rank ``federated_backward`` and ``average_models``.  For a whole job: ``run``
with a ``Config``, and a ``RoundCallback`` that follows it.  After a job: ``load_model``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batchnorm.context import federated_backward, federated_statistics
    from .batchnorm.conversion import convert_batchnorm, revert_batchnorm
    from .batchnorm.layer import FedTANBatchNorm
    from .config.schema import Config
    from .data.federated_data import FederatedData
    from .distributed.model_average import average_model, average_models
    from .evaluation.callbacks import RoundCallback, RunInfo
    from .evaluation.records import RoundRecord, Summary
    from .inference.saved_run import load_model
    from .job.run import run
    from .tasks.task import Task

__version__ = "0.2.0"

__all__ = [
    "Config",
    "FedTANBatchNorm",
    "FederatedData",
    "RoundCallback",
    "RoundRecord",
    "RunInfo",
    "Summary",
    "Task",
    "average_model",
    "average_models",
    "convert_batchnorm",
    "federated_backward",
    "federated_statistics",
    "load_model",
    "revert_batchnorm",
    "run",
]

# Names are imported when they are first used: the command line checks options without torch.
_MODULE_OF = {
    "Config": "config.schema",
    "FedTANBatchNorm": "batchnorm.layer",
    "FederatedData": "data.federated_data",
    "RoundCallback": "evaluation.callbacks",
    "RoundRecord": "evaluation.records",
    "RunInfo": "evaluation.callbacks",
    "Summary": "evaluation.records",
    "Task": "tasks.task",
    "average_model": "distributed.model_average",
    "average_models": "distributed.model_average",
    "convert_batchnorm": "batchnorm.conversion",
    "federated_backward": "batchnorm.context",
    "federated_statistics": "batchnorm.context",
    "load_model": "inference.saved_run",
    "revert_batchnorm": "batchnorm.conversion",
    "run": "job.run",
}


def __getattr__(name: str) -> Any:
    if name == "mpi":  # for mpi.init_process_group
        return import_module(".distributed.mpi.backend", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
