"""The tool that measures strong and weak scaling: its plan, its runs and its report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import scaling_study
from fedtan_hpc.config.errors import ConfigError, RunError
from scaling import study_report, study_runs
from scaling.study_runs import Point
from tests.helpers import commands

SHORT = ("rounds=3", "local_steps=1", "clients=2")


def point_in(folder: Path, ranks: int, repeat: int, seconds: float) -> Point:
    """A finished run whose rounds took ``seconds``."""
    folder.mkdir(parents=True)
    parts = dict.fromkeys(("compute", "statistics", "average", "waiting", "evaluation"), 0.1)
    summary = {"median_round_seconds": seconds, "phases": parts, "backend": "gloo"}
    summary |= {"machine": "a machine", "versions": {"torch": "2"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    last = {"clients": 4, "comm_messages": 5, "comm_bytes": 2000}
    (folder / "rounds.jsonl").write_text(json.dumps(last) + "\n")
    (folder / "config.yaml").write_text("clients: 4\nlocal_steps: 5\n")
    return Point("fedtan", ranks, 4, repeat, folder, [])


@pytest.mark.parametrize(("mode", "efficiency"), [("strong", 0.8), ("weak", 0.4)])
def test_rows_are_medians_and_efficiency_is_against_one_rank(
    mode: str, efficiency: float, tmp_path: Path
) -> None:
    times = {1: [2.0, 1.0, 9.0], 4: [0.625, 5.0, 0.5] if mode == "strong" else [5.0, 5.1, 4.0]}
    points = [
        point_in(tmp_path / f"{ranks}-{repeat}", ranks, repeat, seconds)
        for ranks, runs in times.items()
        for repeat, seconds in enumerate(runs)
    ]
    one, four = study_report.rows(points, mode)
    assert (one["seconds_a_round"], one["spread"], one["efficiency"]) == (2.0, 8.0, 1.0)
    assert four["efficiency"] == pytest.approx(efficiency)
    assert one["client_steps_a_second"] == 4 * 5 / 2.0
    study_report.write([one, four], tmp_path, mode, "the command")
    table = (tmp_path / "scaling.md").read_text()
    assert "| fedtan | 4 | 4 |" in table
    assert "a machine, backend gloo, torch 2." in table
    with open(tmp_path / "scaling.csv", encoding="utf-8") as lines:
        assert [row["ranks"] for row in csv.DictReader(lines)] == ["1", "4"]
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_weak_scaling_has_as_many_clients_on_each_rank() -> None:
    study = scaling_study.plan(["mode=weak", "world_sizes=[4,1]", "repeats=1", "clients=3"])
    assert study.world_sizes == [1, 4]
    assert {(point.ranks, point.clients) for point in study.points()} == {(1, 3), (4, 12)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["world_sizes=[0]"], "world_sizes=0: allowed is a whole number >= 1, 1000000 at most"),
        (["mode=sideways"], "mode=sideways: allowed is strong | weak"),
        (["launcher=rocket"], "launcher=rocket: allowed is torchrun | mpirun | slurm"),
        (["methods=[fedfoo]"], "methods=fedfoo: allowed is fedtan"),
        (["launch.nodes=2"], "launcher=torchrun: allowed is slurm with launch"),
        (["rounds=0"], "rounds=0: allowed is a whole number >= 1"),
        (["batch_sise=3"], "batch_sise=3: no such option; did you mean batch_size?"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scaling_study.plan(words)
    assert caught.value.mistakes[0].startswith(message)


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_what_it_said(tmp_path: Path) -> None:
    words = [*SHORT, "optimizer.lr=1e30"]
    with pytest.raises(RunError, match=r"bad: fedtan_hpc: round \d: the training loss .* finite"):
        study_runs.run_all([Point("fedtan", 1, 2, 0, tmp_path / "bad", words)], "torchrun", [])


@pytest.mark.slow
def test_a_study_runs_what_is_missing(tmp_path: Path) -> None:
    words: list[Any] = ["world_sizes=[1,2]", "methods=[fedtan]", "repeats=1", *SHORT]
    tool = commands.tool("scaling_study.py")
    for expected in ("0 of 2", "2 of 2"):
        done = commands.run("python", tool, *words, "out=study", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"{expected} runs are finished" in done.stdout
    assert (tmp_path / "study" / "scaling.png").exists()
