"""Table and picture of a scaling study."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtan_hpc.reporting import options
from fedtan_hpc.reporting.comparison_plots import look_of
from fedtan_hpc.runtime import atomic_files
from scaling.launch import Point

_PHASES = ("compute", "statistics", "average", "waiting", "evaluation")
_COLUMNS = (
    "method",
    "ranks",
    "clients",
    "repeats",
    "seconds_a_round",
    "spread",
    "rounds_a_second",
    "client_steps_a_second",
    "efficiency",
    *_PHASES,
    "messages",
    "kilobytes",
    "machine",
)


def rows(points: Sequence[Point], mode: str) -> Iterator[dict[str, Any]]:
    """A row for each number of ranks of one method; times are medians over the repeats, in seconds.

    Efficiency is against the smallest number of ranks: t_1 / t_p as a share of the ranks' ratio
    (strong), or as it is (weak).
    """
    base: dict[str, Any] = {}
    for ranks in sorted({point.ranks for point in points}):
        runs = [_read(point.folder) for point in points if point.ranks == ranks]
        row = _row(next(point for point in points if point.ranks == ranks), runs)
        base = base or row
        ratio = base["seconds_a_round"] / row["seconds_a_round"]
        row["efficiency"] = ratio if mode == "weak" else ratio * base["ranks"] / ranks
        yield row


def _read(folder: Path) -> dict[str, Any]:
    """The summary of a run, and its last round."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    [steps] = [line.split()[1] for line in config.splitlines() if line.startswith("local_steps:")]
    return {**summary, "last": json.loads(lines[-1]), "local_steps": int(steps)}


def _row(point: Point, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    times = [float(run["median_round_seconds"]) for run in runs]
    seconds, last = statistics.median(times), runs[0]["last"]
    steps = last["clients"] * runs[0]["local_steps"]
    phases = {
        name: statistics.median(float(run["phases"][name]) for run in runs) for name in _PHASES
    }
    return {
        "method": point.method,
        "ranks": point.ranks,
        "clients": point.clients,
        "repeats": len(runs),
        "seconds_a_round": seconds,
        "spread": max(times) - min(times),
        "rounds_a_second": 1 / seconds,
        "client_steps_a_second": steps / seconds,
        **phases,
        "messages": last["comm_messages"],
        "kilobytes": last["comm_bytes"] / 1000,
        "machine": _machine(runs[0]),
    }


def _machine(run: Mapping[str, Any]) -> str:
    """Of the run's rank 0, as it says."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"{run['machine']}, backend {run['backend']}, {versions}"


def write(found: Sequence[Mapping[str, Any]], out: Path, mode: str, command: str) -> None:
    """``scaling.csv``, ``scaling.md`` and ``scaling.png``."""
    with options.written(out / "scaling.md"):
        atomic_files.replace_text(out / "scaling.csv", _csv(found))
        atomic_files.replace_text(
            out / "scaling.md", "\n".join(_markdown(found, mode, command)) + "\n"
        )
        _draw(found, mode, out / "scaling.png")


def _csv(found: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def _markdown(found: Sequence[Mapping[str, Any]], mode: str, command: str) -> Iterator[str]:
    yield f"# {mode.capitalize()} scaling"
    yield f"\n    {command}\n"
    yield (
        "| method | ranks | clients | ms a round | client-steps a second | efficiency, % | "
        "compute | statistics | average | waiting, ms | messages, kB |"
    )
    yield "| --- " * 11 + "|"
    for row in found:
        carried = " | ".join(f"{1000 * row[name]:.1f}" for name in _PHASES[:-1])
        yield (
            f"| {row['method']} | {row['ranks']} | {row['clients']} "
            f"| {1000 * row['seconds_a_round']:.1f} (± {500 * row['spread']:.1f}) "
            f"| {row['client_steps_a_second']:.0f} | {100 * row['efficiency']:.0f} | {carried} "
            f"| {row['messages']}, {row['kilobytes']:.1f} |"
        )
    yield "\nMedians over the repeats of a run's medians over rounds; in brackets half their range."
    yield "Compute, statistics (collectives of BN layers), average and waiting (for the slowest"
    yield "rank) are means over the ranks, and add up to a round."
    yield f"\n{found[-1]['machine']}."


def _draw(found: Sequence[Mapping[str, Any]], mode: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in found):
        mine = [row for row in found if row["method"] == method]
        colour, marker = look_of(method)
        ranks = [row["ranks"] for row in mine]
        style = {"color": colour, "marker": marker, "label": method}
        left.plot(ranks, [row["client_steps_a_second"] for row in mine], **style)
        right.plot(ranks, [100 * row["efficiency"] for row in mine], **style)
    for axes, text in ((left, "client steps a second"), (right, "efficiency, %")):
        axes.set_xscale("log", base=2)
        sizes = sorted({row["ranks"] for row in found})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("ranks")
        axes.set_ylabel(text)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(f"{mode.capitalize()} scaling")
    atomic_files.replace(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    pyplot.close(figure)
