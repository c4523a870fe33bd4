"""A probe leaves training as it is, costs three passes, and its records survive an interruption."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedtan_hpc
from fedtan_hpc.config.enums import (
    AlgorithmName,
    CohortMode,
    LoadingName,
    ModelName,
    ModelSource,
    NormName,
    PartitionName,
    SamplingName,
)
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    CohortConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PartitionConfig,
    ProbeConfig,
)
from fedtan_hpc.config.validate import check
from fedtan_hpc.evaluation import probe_records
from fedtan_hpc.evaluation.callbacks import RoundCallback
from fedtan_hpc.evaluation.probe_records import ProbeRecord
from fedtan_hpc.evaluation.records import RoundRecord
from fedtan_hpc.files.reading import FileError
from fedtan_hpc.probing import probe as probe_module
from tests.helpers import jobs
from tests.helpers.ranks import on_ranks

TIMES = ("round_seconds", "evaluation_seconds", "statistics_seconds", "average_seconds")


def config(algorithm: str, folder: Path, every: int | None = 1, **options: Any) -> Config:
    """Five unequal clients, three in a round; private states exist from the second round on."""
    defaults: dict[str, Any] = {
        "algorithm": AlgorithmConfig(name=AlgorithmName(algorithm)),
        "data": DataConfig(train_samples=300, test_samples=50),
        "model": ModelConfig(name=ModelName.mlp),
        "partition": PartitionConfig(name=PartitionName.dirichlet, alpha=0.3),
        "optimizer": OptimizerConfig(lr=0.1, momentum=0.9, clip_norm=1.0),
        "clients": 5,
        "clients_per_round": None if algorithm == "centralised" else 3,
        "rounds": 3,
        "local_steps": 2,
        "batch_size": 16,
        "eval_every": 3,
        "probe": ProbeConfig(every=every),
        "run_dir": str(folder),
    }
    return Config(**{**defaults, **options})


def without_times(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in jobs.rounds_of(folder)
    ]


def is_the_same_with_and_without(ranks: int, folder: Path, algorithm: str, **options: Any) -> None:
    for every, name in ((None, "without"), (1, "with")):
        options_of_run = config(algorithm, folder / name, every, **options)
        if ranks == 1:  # ranks of tests cannot start workers
            jobs.run(options_of_run)
        else:
            on_ranks(ranks, jobs.run, options_of_run)
    assert jobs.same_bits(folder / "with", folder / "without")
    assert without_times(folder / "with") == without_times(folder / "without")
    assert not (folder / "without" / probe_records.NAME).exists()
    records = [*probe_records.read(folder / "with")]
    assert [record.round for record in records] == [1, 2, 3]
    assert all(0 <= jobs.known(record.total_deviation["forward"]) < 10 for record in records)


@pytest.mark.parametrize("mode", [CohortMode.sequential, CohortMode.stacked])
@pytest.mark.parametrize(
    "algorithm", ["fedavg", "fedtan", "fedbn", "silobn", "singleset", "centralised"]
)
def test_training_is_the_same_to_the_bit(tmp_path: Path, algorithm: str, mode: CohortMode) -> None:
    is_the_same_with_and_without(1, tmp_path, algorithm, cohort=CohortConfig(mode=mode))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedtan"])
def test_so_it_is_on_several_ranks(tmp_path: Path, algorithm: str, ranks: int) -> None:
    """With 4 ranks one has no client."""
    is_the_same_with_and_without(ranks, tmp_path, algorithm)


def test_so_it_is_where_batches_are_read_ahead(tmp_path: Path) -> None:
    data = DataConfig(train_samples=300, test_samples=50, loading=LoadingName.stream, workers=1)
    is_the_same_with_and_without(1, tmp_path, "fedtan", data=data)


def dropping() -> torch.nn.Module:
    """A network that draws at random."""
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, 16),
        torch.nn.BatchNorm1d(16),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(16, 10),
    )


def test_so_it_is_with_dropout_whose_draws_are_those_of_training(tmp_path: Path) -> None:
    """All clients have the same samples, so the draws alone could make gradients deviate."""
    model = ModelConfig(source=ModelSource.import_, target="tests.probing.test_probe:dropping")
    options = {"model": model, "sampling": SamplingName.replacement, "clients_per_round": None}
    is_the_same_with_and_without(1, tmp_path, "fedavg", clients=1, **options)
    for record in probe_records.read(tmp_path / "with"):
        assert jobs.known(record.total_deviation["both"]) < 1e-5


@pytest.mark.parametrize("algorithm", ["fedavg", "fedtan"])
def test_three_passes_in_a_probed_round_and_none_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    passes: list[Any] = []
    run = probe_module._run

    def counted(replicas: Any, losses: Any, weights: Any, halves: Any) -> Any:
        passes.append((len(replicas), halves))
        return run(replicas, losses, weights, halves)

    monkeypatch.setattr(probe_module, "_run", counted)
    jobs.run(config(algorithm, tmp_path / "run", every=2))
    assert [clients for clients, _ in passes] == [3, 3, 3]
    assert len({halves for _, halves in passes}) == 3
    [record] = probe_records.read(tmp_path / "run")
    assert record.round == 2
    assert record.seconds > 0
    layers = 2
    # In each pass two messages a layer, less those of local halves; then the gradients.
    exchanges = {"fedavg": 4, "fedtan": 2}[algorithm]
    assert record.messages == exchanges * layers + 1


class Keep(RoundCallback):
    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def round_probed(self, record: ProbeRecord) -> None:
        self.told.append(("probed", record.round))

    def round_ended(self, record: RoundRecord) -> None:
        self.told.append(("ended", record.round))


def test_callbacks_are_told_before_the_round_ends(tmp_path: Path) -> None:
    keep = Keep()
    fedtan_hpc.run(config("fedavg", tmp_path / "run", every=2), callbacks=[keep])
    assert keep.told == [("ended", 1), ("probed", 2), ("ended", 2), ("ended", 3)]


def test_records_go_on_after_an_interruption(tmp_path: Path) -> None:
    def options(name: str) -> Config:
        checkpoint = CheckpointConfig(every=2)
        return config("fedtan", tmp_path / name, rounds=5, checkpoint=checkpoint)

    jobs.run(options("whole"))
    jobs.run_until(options("stopped"), 3)
    (tmp_path / "stopped" / "checkpoints" / "round-000003.pt").unlink()  # goes on after round 2
    jobs.run(options("stopped"))
    assert jobs.same_bits(tmp_path / "whole", tmp_path / "stopped")
    whole, stopped = (
        [replace(each, seconds=0.0) for each in probe_records.read(tmp_path / name)]
        for name in ("whole", "stopped")
    )
    assert whole == stopped
    assert len(whole) == 5


def test_a_run_may_begin_to_probe_when_it_goes_on(tmp_path: Path) -> None:
    jobs.run_until(config("fedavg", tmp_path / "run", every=None), 2)
    jobs.run(config("fedavg", tmp_path / "run", every=1))
    assert [record.round for record in probe_records.read(tmp_path / "run")] == [3]


def test_a_finished_run_begun_anew_loses_no_records(tmp_path: Path) -> None:
    jobs.run_until(config("fedavg", tmp_path / "run"), 2)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    jobs.run(config("fedavg", tmp_path / "run"))
    assert len([*probe_records.read(tmp_path / "run")]) == 3
    assert len([*probe_records.read(tmp_path / "run" / "interrupted-1")]) == 2


@pytest.mark.parametrize(
    ("algorithm", "norm"),
    [("fixbn", None), ("fbn", None), ("hbn", None), ("fedavg_gn", None), ("fedavg", NormName.gn)],
)
def test_methods_without_statistics_of_batches_are_refused(
    algorithm: str, norm: NormName | None
) -> None:
    options = config(algorithm, Path("x"), model=ModelConfig(norm=norm), clients_per_round=3)
    with pytest.raises(ConfigError, match=r"probe\.every=1: allowed is null with algorithm="):
        check(options)


GOOD = {
    "round": 1,
    "layers": ["a"],
    "clients": [0, 1],
    "mean_shift": [[0.0, 1.0]],
    "log_variance_ratio": [[0.0, 1.0]],
    "kl_divergence": [[0.0, 1.0]],
    "parameters": ["w"],
    "gradient_norm": [1.0],
    "deviation": {"both": [0.5]},
    "cosine": {"both": [None]},
    "total_deviation": {"both": 0.5},
    "total_cosine": {"both": 0.9},
}


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / probe_records.NAME).write_text(json.dumps({**GOOD, "new": 1}) + "\n" + '{"rou')
    [record] = probe_records.read(tmp_path)
    assert record.layer_means("mean_shift") == {"a": 0.5}
    assert record.scalars()["probe_deviation_both/w"] == 0.5
    assert "probe_cosine_both/w" not in record.scalars()


@pytest.mark.parametrize(
    "change",
    [
        {"round": 0},
        {"round": "x"},
        {"mean_shift": [[0.0]]},
        {"mean_shift": [[0.0, "x"]]},
        {"kl_divergence": []},
        {"deviation": {"both": [0.5, 0.5]}},
        {"cosine": [0.5]},
        {"gradient_norm": []},
        {"parameters": [3]},
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / probe_records.NAME).write_text(json.dumps({**GOOD, **change}) + "\n")
    with pytest.raises(FileError, match=r"probe\.jsonl.*line 1"):
        [*probe_records.read(tmp_path)]
    assert [*probe_records.read(tmp_path, skips_damaged=True)] == []
