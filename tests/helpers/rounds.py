"""Jobs whose clients have whole batches, their rounds, and distances between models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtan_hpc.config.enums import AlgorithmName, ModelName, PartitionName, PrecisionName
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PartitionConfig,
)
from fedtan_hpc.data.client_store import Client
from fedtan_hpc.runtime.device import DevicePlacement
from fedtan_hpc.training.cohort import Cohort
from fedtan_hpc.training.local_step import RoundContext

CPU = DevicePlacement(torch.device("cpu"), "gloo")


def iid_config(algorithm: str = "fedtan", **options: object) -> Config:
    """A job of two clients with whole batches: on two ranks every rank has one."""
    defaults: dict[str, object] = {
        "algorithm": AlgorithmConfig(name=AlgorithmName(algorithm)),
        "data": DataConfig(train_samples=200, test_samples=50),
        "model": ModelConfig(name=ModelName.cnn),
        "partition": PartitionConfig(name=PartitionName.iid),
        "optimizer": OptimizerConfig(lr=0.05, momentum=0.9, weight_decay=1e-4),
        "precision": PrecisionName.float64,
        "clients": 2,
        "rounds": 3,
        "local_steps": 3,
        "batch_size": 16,
        "eval_every": 3,
    }
    return Config(**{**defaults, **options})  # type: ignore[arg-type]


def train_round(cohort: Cohort, clients: Sequence[Client], context: RoundContext) -> list[Tensor]:
    """Trains this rank's clients, averages the models and returns the clients' losses."""
    model_sum = cohort.begin_round(context)
    losses = cohort.runner.run(clients, context, model_sum)
    cohort.end_round(model_sum)
    return losses


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest ||a - b|| / ||b|| of any tensor."""
    return max(
        float((a[n] - b[n]).double().norm() / b[n].double().norm().clamp_min(1e-6)) for n in b
    )
