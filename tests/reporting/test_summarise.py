"""Finished runs in a table and a picture: labels that tell lines apart, and legends that fit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib import colors, pyplot

from fedtan_hpc.config.enums import AlgorithmName
from fedtan_hpc.reporting import pictures, summarise
from fedtan_hpc.reporting.comparison import plots
from fedtan_hpc.reporting.reports import Run, flat
from tests.helpers import commands


def run_of(seed: int = 0, accuracy: float = 0.5, **options: str) -> Run:
    """A run of two rounds; dots in the options' names are written as two underscores."""
    names = {name.replace("__", "."): value for name, value in options.items()}
    figures = {"comm_messages": 5, "comm_bytes": 3000, "payload_messages": 5, "payload_bytes": 3000}
    rounds = [{"round": n, "test_accuracy": accuracy, "test_loss": 1.0, **figures} for n in (1, 2)]
    seconds = {"median_round_seconds": 0.02, "startup_seconds": 1.5, "peak_memory_bytes": 2e8}
    ignored = {"run_dir": f"runs/{seed}", "checkpoint": {"every": seed}, "callbacks": [seed]}
    return Run(dict(flat({"seed": seed, **ignored, **names})), rounds, seconds)


def test_a_line_is_named_after_options_that_differ_and_have_a_value() -> None:
    common = {"rounds": "2", "data__name": "digits"}
    runs = [
        run_of(0, 0.9, algorithm__name="fedtan", algorithm__mu="None", steps="[]", **common),
        run_of(1, 0.8, algorithm__name="fedtan", algorithm__mu="None", steps="[]", **common),
        run_of(0, 0.7, algorithm__name="fedprox", algorithm__mu="0.1", steps="[]", **common),
        run_of(0, 0.6, algorithm__name="fedprox", algorithm__mu="0.1", steps="[5]", **common),
    ]
    lines = summarise.grouped(runs)
    labels = ["fedtan", "algorithm.mu=0.1, fedprox", "algorithm.mu=0.1, fedprox, steps=[5]"]
    assert list(lines) == labels
    assert [len(line) for line in lines.values()] == [2, 1, 1]


def test_runs_that_differ_in_nothing_are_one_line() -> None:
    assert list(summarise.grouped([run_of(0, rounds="2"), run_of(1, rounds="2")])) == ["all runs"]


def test_a_line_without_any_value_says_so() -> None:
    """An option that only later versions have is like one without a value."""
    runs = [run_of(0, 0.9, mu="None"), run_of(1, 0.8, mu="0.1"), run_of(2, 0.7)]
    lines = summarise.grouped(runs)
    assert {label: len(line) for label, line in lines.items()} == {"no mu": 2, "mu=0.1": 1}


def test_the_table_has_mean_and_deviation() -> None:
    lines = summarise.grouped([run_of(0, 0.5), run_of(1, 0.6)])
    heads, rule, row = summarise.table(lines)
    assert heads.startswith("| runs | seeds | test accuracy, % | messages, kB a round |")
    assert rule == "|" + " --- |" * 7
    assert row == "| all runs | 2 | 55.0 ± 7.1 | 5, 3.0 | 20 | 1.5 | 200 |"


LABELS = {
    "short": ["fedtan", "fedavg"],
    "many": [f"fedtan, option={number}" for number in range(40)],
    "long": ["fedtan, " + ", ".join(f"group.option_{n}={n}.5" for n in range(30)), "fedavg"],
    "without spaces": ["fedtan, data.root=/" + "very_long_folder/" * 20, "fedavg"],
    "wide letters": ["fedtan, " + "W" * 200, "fedavg"],
}


@pytest.mark.parametrize(
    "labels",
    [
        [str(name) for name in AlgorithmName],
        [f"{name}, local_steps={steps}" for name in AlgorithmName for steps in (1, 2, 3, 5)],
        [f"fedtan, option={number}" for number in range(32)],
        [f"partition={name}" for name in range(32)],
    ],
    ids=["algorithms", "variants", "many variants", "other labels"],
)
def test_no_two_lines_look_alike(labels: list[str]) -> None:
    """Also where only grey is seen, or the markers are too small."""
    found = [
        (style["color"], str(style["linestyle"]), style["marker"])
        for style in pictures.styles(labels)
    ]
    assert len(set(found)) == len({look[:2] for look in found}) == len(labels)
    assert ":" not in [dash for _, dash, _ in found]


LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the brightness of a colour."""


def test_neighbours_differ_in_brightness() -> None:
    shades = [
        sum(share * part for share, part in zip(LUMA, colors.to_rgb(style["color"]), strict=True))
        for style in pictures.styles([f"number={number}" for number in range(8)])
    ]
    assert min(abs(a - b) for a, b in pairwise(shades)) > 0.15


def test_an_algorithm_looks_the_same_everywhere() -> None:
    [alone] = pictures.styles(["fedavg"])
    assert pictures.styles(["fedtan", "fedavg"])[1] == alone
    assert pictures.styles(["fedavg, local_steps=5", "fedtan"])[0] == alone


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("tool", ["summarise", "compare"])
def test_no_legend_is_cut_off(
    tool: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All letters lie inside of the picture, and the curves keep their room."""
    figures: list[Any] = []
    close: Callable[[Any], None] = pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    lines = {label: [run_of(seed, 0.5 + seed / 10) for seed in (0, 1)] for label in LABELS[name]}
    if tool == "summarise":
        summarise.draw(lines, tmp_path / "summary.png")
    else:
        plots.draw(lines, tmp_path)
    [figure] = figures
    figure.draw_without_rendering()
    [legend] = figure.legends
    for text in legend.get_texts():
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    height = sum(axes.get_window_extent().height for axes in figure.axes) / figure.dpi
    assert height / len(figure.axes) > 2
    assert len(list(tmp_path.glob("*.png"))) == 1
    close(figure)


def test_folders_that_hold_no_finished_run_are_named(tmp_path: Path) -> None:
    tool = str(commands.ROOT / "tools" / "summarise_runs.py")
    done = commands.forked("python", tool, str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    first, last = done.stderr.splitlines()
    assert first == f"left out, because it is no finished run: {tmp_path}"
    assert last == "summarise_runs: none of the folders holds a finished run"


def test_a_picture_takes_runs_of_other_tasks_and_runs_that_ended_early(tmp_path: Path) -> None:
    early, whole, other = run_of(0, task="a"), run_of(1, task="a"), run_of(0, task="b")
    early = Run(early.options, early.records[:1], early.summary)
    records = [{**record, "test_accuracy": None, "test_mae": 0.1} for record in other.records]
    other = Run(other.options, records, other.summary)
    lines = summarise.grouped([early, whole, other])
    assert [len(line) for line in lines.values()] == [2, 1]
    summarise.draw(lines, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 0
