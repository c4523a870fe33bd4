"""Accuracy of finished runs, mean and deviation over seeds: a Markdown table and a picture.

    python tools/summarise_runs.py runs/*/ --picture accuracy.png

Runs that differ in nothing but the seed (and their folder) are one line; lines are named after
the options in which they differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

_APART = ("seed", "run_dir")
"""Options that do not set two lines apart."""


@dataclass(frozen=True)
class Run:
    """A finished run: its options by dotted name, and (round, test accuracy) points."""

    options: Mapping[str, str]
    points: Sequence[tuple[int, float]]
    summary: Mapping[str, Any]
    messages: int
    bytes: int


def main() -> None:
    """Read the folders, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    runs = [read(folder) for folder in arguments.folders if (folder / "summary.json").exists()]
    if not runs:
        parser.error("none of the folders holds a finished run")
    lines = grouped(runs)
    print("\n".join(table(lines)))
    if arguments.picture:
        draw(lines, arguments.picture)


def read(folder: Path) -> Run:
    """The run in ``folder``."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    options = _flat(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    accuracies = [(r["round"], r["test_accuracy"]) for r in rounds]
    return Run(
        options=options,
        points=[(number, value) for number, value in accuracies if value is not None],
        summary=summary,
        messages=rounds[-1]["comm_messages"],
        bytes=rounds[-1]["comm_bytes"],
    )


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by line, best first; a line is named after what sets it apart from the others."""
    names = sorted({name for run in runs for name in run.options})
    telling = [
        name
        for name in names
        if name not in _APART and len({run.options.get(name) for run in runs}) > 1
    ]
    lines: dict[str, list[Run]] = {}
    for run in runs:
        label = ", ".join(_short(name, run.options.get(name, "")) for name in telling)
        lines.setdefault(label or "all runs", []).append(run)
    return dict(sorted(lines.items(), key=lambda line: -_mean_accuracy(line[1])))


def table(lines: Mapping[str, Sequence[Run]]) -> list[str]:
    """Mean and sample deviation of the final test accuracy, in percent."""
    rows = [
        "| runs | seeds | test accuracy, % | messages, kB a round | ms a round | start-up, s "
        "| peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label, runs in lines.items():
        final = [100 * run.points[-1][1] for run in runs]
        spread = f" ± {statistics.stdev(final):.1f}" if len(final) > 1 else ""
        rows.append(
            f"| {label} | {len(runs)} | {statistics.mean(final):.1f}{spread} "
            f"| {runs[0].messages}, {runs[0].bytes / 1000:.1f} "
            f"| {1000 * _median(runs, 'median_round_seconds'):.0f} "
            f"| {_median(runs, 'startup_seconds'):.1f} "
            f"| {_median(runs, 'peak_memory_bytes') / 1e6:.0f} |"
        )
    return rows


def draw(lines: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Accuracy against rounds: the mean of each line, and the band from worst to best seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, runs in lines.items():
        rounds = [number for number, _ in runs[0].points]
        columns = list(
            zip(*([100 * value for _, value in run.points] for run in runs), strict=True)
        )
        [line] = axes.plot(rounds, [statistics.mean(c) for c in columns], label=label, marker=".")
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(rounds, low, high, color=line.get_color(), alpha=0.2)
    axes.set(xlabel="round", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(title="mean, band from worst to best seed")
    figure.savefig(path, dpi=150)


def _mean_accuracy(runs: Sequence[Run]) -> float:
    return statistics.mean(run.points[-1][1] for run in runs)


def _median(runs: Sequence[Run], key: str) -> float:
    return statistics.median(float(run.summary[key]) for run in runs)


def _short(option: str, value: str) -> str:
    """A choice by its name alone, other options as name=value."""
    return value if option.endswith(".name") else f"{option}={value}"


def _flat(options: Any, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat


if __name__ == "__main__":
    main()
