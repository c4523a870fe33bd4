"""Accuracy of finished runs, mean and deviation over seeds: a Markdown table and a picture.

    python tools/summarise_runs.py runs/*/ --picture accuracy.png

Runs that differ in nothing but the seed (and their folder) are one line; lines are named after
the options in which they differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import cli
from ..config.errors import ConfigError
from ..runtime import atomic_files
from . import options, reports
from .reports import Run

_LONGEST_LABEL = 90
"""Letters of a line in the legend."""


def main() -> None:
    """Read the folders, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    with cli.exit_codes("summarise_runs"):
        if arguments.picture:
            options.check_plotting()
            options.check_writable(arguments.picture)
        lines = grouped(_runs(arguments.folders))
        print("\n".join(table(lines)))
        if arguments.picture:
            draw(lines, arguments.picture)


def _runs(folders: Sequence[Path]) -> list[Run]:
    """Those that are finished; what is left out is said."""
    runs = []
    for folder in folders:
        if not reports.finished(folder):
            print(f"left out, for it is no finished run: {folder}", file=sys.stderr)
            continue
        try:
            runs.append(reports.read(folder))
        except reports.DAMAGED as error:
            reason = " ".join(str(error).split())
            print(f"left out, for it cannot be read: {folder} ({reason})", file=sys.stderr)
    if not runs:
        raise ConfigError("none of the folders holds a finished run")
    return runs


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
    from matplotlib.ticker import MaxNLocator

    labels = {label: textwrap.fill(label, _LONGEST_LABEL) for label in lines}
    rows = sum(1 + label.count("\n") for label in labels.values())
    figure, axes = pyplot.subplots(figsize=(7, 4 + 0.2 * rows), layout="constrained")
    for label, runs in lines.items():
        rounds = [record["round"] for record in runs[0].evaluated]
        curves = [[100 * record["test_accuracy"] for record in run.evaluated] for run in runs]
        reports.band(axes, rounds, curves, label=labels[label], marker=".")
    axes.set(xlabel="round", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", title="mean, band from worst to best seed")
    atomic_files.replace(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    pyplot.close(figure)


def _median(runs: Sequence[Run], key: str) -> float:
    return statistics.median(float(run.summary[key]) for run in runs)


def _short(option: str, value: str) -> str:
    """A choice by its name alone, other options as name=value."""
    return value if option.endswith(".name") else f"{option}={value}"


if __name__ == "__main__":
    main()
