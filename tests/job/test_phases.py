"""The phases of a round: computing, statistics, average, waiting and evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedtan_hpc
from fedtan_hpc.config.schema import Config
from fedtan_hpc.distributed import process_group
from fedtan_hpc.evaluation.records import RoundRecord, Summary
from fedtan_hpc.job.summary import phases
from tests.helpers.ranks import on_ranks

CPU = torch.device("cpu")


def record(whole: float, statistics: float, average: float) -> RoundRecord:
    zeros: dict[str, Any] = dict.fromkeys(RoundRecord.__dataclass_fields__, 0)
    values = replace(RoundRecord(**zeros | {"metrics": {}}), round_seconds=whole)
    return replace(values, statistics_seconds=statistics, average_seconds=average)


def phases_of_rank() -> dict[str, float]:
    """Rank 1 is slower by 3 s in every round, so that rank 0 waits in the collectives."""
    collectives = (4, 2) if process_group.rank() == 0 else (2, 1)
    return phases([record(10, *collectives)] * 2, CPU)


def test_the_slowest_rank_waits_least() -> None:
    """Transfers take 3 s, two thirds of them statistics; one of two ranks waits for 3 s."""
    for found in on_ranks(2, phases_of_rank):
        assert found == pytest.approx(
            {"compute": 5.5, "statistics": 2, "average": 1, "waiting": 1.5, "evaluation": 0}
        )


def test_a_single_process_only_computes() -> None:
    found = phases([record(10, 0, 0)], CPU)
    assert found["compute"] == 10
    assert found["statistics"] == found["average"] == found["waiting"] == 0
    assert set(phases([], CPU).values()) == {0.0}


def run_in(folder: str) -> Summary:
    config = Config(clients=2, rounds=4, local_steps=1, run_dir=folder)
    return fedtan_hpc.run(config, callbacks=[])


def test_phases_add_up_to_a_round(tmp_path: Path) -> None:
    summary = on_ranks(2, run_in, str(tmp_path))[0]
    assert all(seconds > 0 for name, seconds in summary.phases.items() if name != "waiting")
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        assert 0 < line["statistics_seconds"] + line["average_seconds"] < line["round_seconds"]
