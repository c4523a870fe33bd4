"""Small jobs for tests: their options, runs that stop early, and what they leave."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedtan_hpc
from fedtan_hpc.config.enums import AlgorithmName, PartitionName, ServerOptimizerName
from fedtan_hpc.config.errors import Stopped
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    LrScheduleConfig,
    OptimizerConfig,
    PartitionConfig,
    ServerConfig,
)
from fedtan_hpc.evaluation.callbacks import RoundCallback
from fedtan_hpc.evaluation.records import RoundRecord, Summary

ROUNDS = 6


def small(clients: int, **options: object) -> Config:
    """Three rounds on digits with unequal clients."""
    defaults: dict[str, object] = {
        "partition": PartitionConfig(name=PartitionName.dirichlet, alpha=0.5),
        "rounds": 3,
        "local_steps": 3,
        "lr_schedule": LrScheduleConfig(milestones=[2], gamma=0.5),
        "eval_every": 2,
    }
    return Config(clients=clients, **{**defaults, **options})  # type: ignore[arg-type]


def run_here(config: Config, folder: str) -> Summary:
    config.run_dir = folder
    return fedtan_hpc.run(config)


def config_of(name: str, folder: Path | str, **options: Any) -> Config:
    """Unequal clients, three of four in a round, and whatever the method keeps between rounds."""
    server = ServerOptimizerName.none
    if name == "fedavg":
        server = ServerOptimizerName.adam
    defaults: dict[str, Any] = {
        "clients": 4,
        "clients_per_round": None if name == "centralised" else 3,
        "partition": PartitionConfig(name=PartitionName.dirichlet, alpha=0.5),
        "optimizer": OptimizerConfig(lr=0.1, momentum=0.9),
        "server": ServerConfig(optimizer=server),
        "rounds": ROUNDS,
        "local_steps": 2,
        "eval_every": 2,
        "checkpoint": CheckpointConfig(every=2),
        "algorithm": AlgorithmConfig(name=AlgorithmName(name)),
        "run_dir": str(folder),
    }
    return Config(**{**defaults, **options})


def known(value: float | None) -> float:
    """The figure, which must be there."""
    assert value is not None
    return value


class StopAfter(RoundCallback):
    """Asks for the end in a round, as a user's Ctrl-C would."""

    def __init__(self, number: int, kind: int = signal.SIGINT) -> None:
        self.number, self.kind = number, kind

    def round_ended(self, record: RoundRecord) -> None:
        if record.round == self.number - 1:
            os.kill(os.getpid(), self.kind)


def run(config: Config) -> Summary:
    return fedtan_hpc.run(config, callbacks=[])


def run_until(config: Config, number: int) -> None:
    """Stopped after round ``number``, on every rank."""
    with pytest.raises(Stopped, match=f"after round {number}"):
        fedtan_hpc.run(config, callbacks=[StopAfter(number)])


def state_of(folder: Path) -> dict[str, Tensor]:
    return dict(torch.load(folder / "model.pt"))


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def same_bits(a: Path, b: Path) -> bool:
    first, second = state_of(a), state_of(b)
    return first.keys() == second.keys() and all(
        _bits(first[name]) == _bits(second[name]) for name in first
    )


def _bits(value: Tensor) -> bytes:
    return value.contiguous().numpy().tobytes()
