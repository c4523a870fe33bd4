"""Shows the test metric of finished runs, mean and deviation over seeds: as table and picture.

    python -m fedtan_hpc.summarise_runs runs/*/ --picture accuracy.png

Runs that differ only in the seed and in their folder are one line.  A line is named after the
options that differ between the lines and have a value in its runs.  A checkout also has
``python tools/summarise_runs.py``.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import cli
from ..config.errors import ConfigError, printable
from . import options, pictures, reports
from .reports import Lines, Measure, Run

_HEADS = "runs|seeds|test {}|messages, kB a round|ms a round|start-up, s|peak MB"


def main(words: Sequence[str] | None = None) -> None:
    """Reads the folders, prints the table, draws the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    arguments = parser.parse_args(words)
    with cli.exit_codes("summarise_runs"):
        if arguments.picture:
            options.check_plotting()
            options.check_writable(arguments.picture)
        lines = grouped(_finished_runs(arguments.folders))
        print("\n".join(table(lines)))
        if arguments.picture:
            draw(lines, arguments.picture)


def _finished_runs(folders: Sequence[Path]) -> list[Run]:
    for folder in folders:
        if not reports.finished(folder):
            print(printable(f"left out, because it is no finished run: {folder}"), file=sys.stderr)
    runs = list(reports.read_whole(filter(reports.finished, folders)))
    if not runs:
        raise ConfigError("none of the folders holds a finished run")
    return runs


def grouped(runs: Sequence[Run]) -> Lines:
    """Returns the runs by the label of their line, best first."""
    names = sorted({name for run in runs for name in run.options} - set(reports.IGNORED))
    differing = [name for name in names if len({run.options.get(name) for run in runs}) > 1]
    lines: Lines = {}
    for run in runs:
        lines.setdefault(_label(run, differing), []).append(run)
    return reports.best_first(lines)


def _label(run: Run, differing: Sequence[str]) -> str:
    """Names the differing options that have a value: choices by the value alone."""
    values = {name: run.options.get(name, "None") for name in differing}
    words = [
        value if name.endswith(".name") else f"{name}={value}"
        for name, value in values.items()
        if value not in ("None", "[]", "")
    ]
    return ", ".join(words or [f"no {name}" for name in differing]) or "all runs"


def table(lines: Lines) -> list[str]:
    """Returns the lines of a table: the final test metric, and what the runs cost."""
    measure = Measure.of(lines)
    heads = _HEADS.format(measure.text).split("|")
    return reports.markdown_table(heads, (_row(*line, measure) for line in lines.items()))


def _row(label: str, runs: Sequence[Run], measure: Measure) -> list[str]:
    last = runs[0].records[-1]
    return [
        label,
        str(len(runs)),
        measure.summary(runs, measure.test),
        f"{last['comm_messages']}, {last['comm_bytes'] / 1000:.1f}",
        f"{1000 * _median(runs, 'median_round_seconds'):.0f}",
        f"{_median(runs, 'startup_seconds'):.1f}",
        f"{_median(runs, 'peak_memory_bytes') / 1e6:.0f}",
    ]


def _median(runs: Sequence[Run], key: str) -> float:
    return statistics.median(float(run.summary[key]) for run in runs)


def draw(lines: Lines, path: Path) -> None:
    """Draws the metric against rounds: the mean of a line, and the band from worst to best seed."""
    measure = Measure.of(lines)
    with pictures.picture(path, figsize=(7, 4)) as (figure, axes):
        looks = zip(lines.items(), pictures.styles(list(lines)), strict=True)
        for (label, runs), style in looks:
            indices = reports.evaluated_together(runs)
            rounds = [runs[0].records[n]["round"] for n in indices]
            pictures.band(axes, rounds, measure.curves(runs, indices), label=label, **style)
        axes.set(xlabel="round", ylabel=f"test {measure.text}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        several = any(len(runs) > 1 for runs in lines.values())
        note = "mean; band from worst to best seed" if several else None
        pictures.legend_beside(figure, axes, note)
