"""The files of a scaling study: a table in CSV and Markdown, and a picture."""

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtan_hpc.files import atomic_files
from fedtan_hpc.reporting import options, pictures
from scaling import plots
from scaling.study_runs import Point

_PHASES = ("compute", "statistics", "average", "waiting", "evaluation")
_HEADS = (
    "| method | ranks | clients | ms a round | client-steps a second | efficiency, % | compute | "
    "statistics | average | waiting, ms | messages, kB |"
)

Rows = Sequence[Mapping[str, Any]]


def rows(points: Sequence[Point], mode: str) -> Iterator[dict[str, Any]]:
    """Yields a row for each number of ranks of one method; times in seconds, medians over repeats.

    Efficiency compares with the smallest number of ranks: t_1 / t_p times their ratio of ranks
    (strong), or t_1 / t_p (weak).
    """
    base: dict[str, Any] = {}
    for ranks in sorted({point.ranks for point in points}):
        repeats = [point for point in points if point.ranks == ranks]
        row = _row(repeats[0], [_read(point.folder) for point in repeats])
        base = base or row
        ratio = base["seconds_a_round"] / row["seconds_a_round"]
        row["efficiency"] = ratio if mode == "weak" else ratio * base["ranks"] / ranks
        yield row


def _read(folder: Path) -> dict[str, Any]:
    """Returns the summary of a run, with its last round and its local steps."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    [steps] = [line.split()[1] for line in config.splitlines() if line.startswith("local_steps:")]
    return {**summary, "last": json.loads(lines[-1]), "local_steps": int(steps)}


def _row(point: Point, runs: Rows) -> dict[str, Any]:
    """Returns a row in the order of the CSV file's columns; ``rows`` sets the efficiency."""
    times = [float(run["median_round_seconds"]) for run in runs]
    seconds, first = statistics.median(times), runs[0]
    phases = {name: statistics.median(run["phases"][name] for run in runs) for name in _PHASES}
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return {
        "method": point.method,
        "ranks": point.ranks,
        "clients": point.clients,
        "repeats": len(runs),
        "seconds_a_round": seconds,
        "spread": max(times) - min(times),
        "rounds_a_second": 1 / seconds,
        "client_steps_a_second": first["last"]["clients"] * first["local_steps"] / seconds,
        "efficiency": 1.0,
        **phases,
        "messages": first["last"]["comm_messages"],
        "kilobytes": first["last"]["comm_bytes"] / 1000,
        "machine": f"{first['machine']}, backend {first['backend']}, {versions}",
    }


def write(found: Rows, out: Path, mode: str, command: str) -> None:
    """Writes ``scaling.csv``, ``scaling.md`` and ``scaling.png``."""
    with options.written(out / "scaling.md"):
        atomic_files.replace_text(out / "scaling.csv", _csv(found))
        markdown = "\n".join(_markdown(found, mode, command)) + "\n"
        atomic_files.replace_text(out / "scaling.md", markdown)
        _draw(found, mode, out / "scaling.png")


def _csv(found: Rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def _markdown(found: Rows, mode: str, command: str) -> Iterator[str]:
    yield f"# {mode.capitalize()} scaling"
    yield f"\n    {command}\n"
    yield _HEADS
    yield "| --- " * 11 + "|"
    for row in found:
        phases = " | ".join(f"{1000 * row[name]:.1f}" for name in _PHASES[:-1])
        yield (
            f"| {row['method']} | {row['ranks']} | {row['clients']} "
            f"| {1000 * row['seconds_a_round']:.1f} (± {500 * row['spread']:.1f}) "
            f"| {row['client_steps_a_second']:.0f} | {100 * row['efficiency']:.0f} | {phases} "
            f"| {row['messages']}, {row['kilobytes']:.1f} |"
        )
    yield "\nTimes are medians over the repeats of a run's median over its rounds; in brackets is"
    yield "half of the range.  Compute, statistics (collectives of BN layers), average and waiting"
    yield "(for the slowest rank) are means over the ranks, and add up to a round."
    yield f"\n{found[-1]['machine']}."


def _draw(found: Rows, mode: str, path: Path) -> None:
    columns = {"client_steps_a_second": "client steps per second", "efficiency": "efficiency, %"}
    with pictures.picture(path, 1, 2, figsize=(9, 3.8)) as (figure, panels):
        for axes, (column, label) in zip(panels, columns.items(), strict=True):
            plots.draw_methods(axes, found, column, {})
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        panels[0].legend()
        figure.suptitle(f"{mode.capitalize()} scaling")
