"""Accuracy of finished runs, mean and deviation over seeds: a Markdown table and a picture.

    python tools/summarise_runs.py runs/*/ --picture accuracy.png

Runs that differ in nothing but the seed (and their folder) are one line; lines are named after
the options in which they differ.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import reports
from reports import Run


def main() -> None:
    """Read the folders, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    runs = [reports.read(folder) for folder in arguments.folders if reports.finished(folder)]
    if not runs:
        parser.error("none of the folders holds a finished run")
    lines = grouped(runs)
    print("\n".join(table(lines)))
    if arguments.picture:
        draw(lines, arguments.picture)


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by line, best first; a line is named after what sets it apart from the others."""
    names = sorted({name for run in runs for name in run.options})
    telling = [
        name
        for name in names
        if name not in reports.APART and len({run.options.get(name) for run in runs}) > 1
    ]
    lines: dict[str, list[Run]] = {}
    for run in runs:
        label = ", ".join(_short(name, run.options.get(name, "")) for name in telling)
        lines.setdefault(label or "all runs", []).append(run)
    return reports.best_first(lines)


def table(lines: Mapping[str, Sequence[Run]]) -> list[str]:
    """Mean and sample deviation of the final test accuracy, in percent."""
    rows = [
        "| runs | seeds | test accuracy, % | messages, kB a round | ms a round | start-up, s "
        "| peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label, runs in lines.items():
        final, last = [100 * run.accuracy for run in runs], runs[0].records[-1]
        rows.append(
            f"| {label} | {len(runs)} | {reports.mean_and_deviation(final)} "
            f"| {last['comm_messages']}, {last['comm_bytes'] / 1000:.1f} "
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
        rounds = [record["round"] for record in runs[0].evaluated]
        curves = [[100 * record["test_accuracy"] for record in run.evaluated] for run in runs]
        reports.band(axes, rounds, curves, label=label, marker=".")
    axes.set(xlabel="round", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(title="mean, band from worst to best seed")
    figure.savefig(path, dpi=150)


def _median(runs: Sequence[Run], key: str) -> float:
    return statistics.median(float(run.summary[key]) for run in runs)


def _short(option: str, value: str) -> str:
    """A choice by its name alone, other options as name=value."""
    return value if option.endswith(".name") else f"{option}={value}"


if __name__ == "__main__":
    main()
