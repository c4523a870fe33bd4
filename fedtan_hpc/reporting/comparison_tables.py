"""A comparison as a table in Markdown and as rows for other programs."""

from __future__ import annotations

import csv
import io
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.enums import ModelSource
from ..config.schema import Config
from ..runtime import atomic_files
from . import comparison_runs
from .comparison_runs import Comparison
from .reports import Run, mean_and_deviation

_FIGURES = (
    "train_loss",
    "pooled_train_loss",
    "test_accuracy",
    "test_loss",
    "clients_test_accuracy_mean",
    "clients_test_accuracy_spread",
    "clients_own_mix_accuracy_mean",
    "clients_own_mix_accuracy_spread",
)
_OWN = "clients_own_mix_accuracy_mean"

Lines = Mapping[str, Sequence[Run]]
"""Runs by label, by seed."""


def write_csv(lines: Lines, path: Path) -> None:
    """A row for each evaluated round; ``payload_bytes`` are those of all rounds until then."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", "round", "payload_bytes", *_FIGURES])
    for label, runs in lines.items():
        for run in runs:
            writer.writerows([label, run.options["seed"], *row] for row in _rows(run))
    atomic_files.replace_text(path, text.getvalue())


def _rows(run: Run) -> Iterator[list[Any]]:
    for record, sent in zip(run.records, itertools.accumulate(run.payloads), strict=True):
        if record["test_accuracy"] is not None:
            yield [record["round"], sent, *(record.get(name) for name in _FIGURES)]


def table(lines: Lines) -> list[str]:
    """The last round of each method, mean ± sample deviation over the seeds; best first."""
    own = any(_has_own(runs) for runs in lines.values())
    heads = ["method", "seeds", "test accuracy, %", *(["own-mix accuracy, %"] if own else [])]
    heads += ["test loss", "messages a round", "kB a round"]
    rows = [heads, ["---"] * len(heads)]
    for label, runs in lines.items():
        row = [label, str(len(runs)), _percent(runs, "test_accuracy")]
        if own:
            row.append(_percent(runs, _OWN) if _has_own(runs) else "")
        row.append(mean_and_deviation([run.evaluated[-1]["test_loss"] for run in runs], 3))
        rows.append([*row, _messages(runs), _kilobytes(runs)])
    return [f"| {' | '.join(row)} |" for row in rows]


def write_markdown(
    rows: Sequence[str],
    lines: Lines,
    asked: Comparison,
    command: str,
) -> None:
    """The table, how it came about and what its columns mean."""
    waiting, others = comparison_runs.missing(asked), comparison_runs.others(asked, lines)
    runs = [run for runs in lines.values() for run in runs]
    rounds = sorted({len(run.records) for run in runs})
    text = [
        f"# {title(asked.settings)}",
        f"    {command}",
        f"Settings: {_unusual(asked.settings)}.  All of them are in `settings.yaml`.",
        "\n".join(rows),
        f"After {_from_to(rounds)} rounds: mean ± sample deviation over the seeds.  Messages and "
        "kB: collectives of a round and what one rank puts into them.",
        *([_about_own(lines)] if _about_own(lines) else []),
        *([f"Not finished: {', '.join(waiting)}."] if waiting else []),
        *([f"Run by other commands: {', '.join(others)}."] if others else []),
        *dict.fromkeys(_machine(run) for run in runs),
        "![Accuracy and loss against rounds and megabytes](compare.png)",
    ]
    atomic_files.replace_text(asked.out / "compare.md", "\n\n".join(text) + "\n")


def title(settings: Mapping[str, str]) -> str:
    """The setting in a line."""
    names = ", ".join([settings["data.name"], _network(settings), settings["partition.name"]])
    return f"{names}, {settings['clients']} clients, {settings['local_steps']} local steps"


def _network(settings: Mapping[str, str]) -> str:
    """The network's name, of one's own too."""
    if settings["model.source"] != ModelSource.target:
        return settings["model.name"]
    return settings["model.target"].rpartition(":")[2]


def _from_to(numbers: Sequence[int]) -> str:
    low, high = numbers[0], numbers[-1]
    return str(low) if low == high else f"{low} to {high}"


def _machine(run: Run) -> str:
    """Where a run ran."""
    versions = ", ".join(f"{name} {version}" for name, version in run.summary["versions"].items())
    ranks, device = run.summary["world_size"], run.summary["device"]
    return f"Ranks {ranks}, device {device}, {versions}."


def _unusual(settings: Mapping[str, str]) -> str:
    usual = comparison_runs.shared(Config())
    said = [f"`{name}={value}`" for name, value in settings.items() if usual.get(name) != value]
    return ", ".join(said) if said else "the defaults"


def _about_own(lines: Lines) -> str:
    own = [label for label, runs in lines.items() if _has_own(runs)]
    if not own:
        return ""
    return (
        f"{', '.join(own)}: there is no one global model; the figures are means over the clients "
        "of each client's own model, on the whole test set and (own-mix) on test samples in the "
        "mix of classes of the client's training data."
    )


def _has_own(runs: Sequence[Run]) -> bool:
    return any(run.evaluated[-1].get(_OWN) is not None for run in runs)


def _percent(runs: Sequence[Run], figure: str) -> str:
    return mean_and_deviation([100 * run.evaluated[-1][figure] for run in runs])


def _messages(runs: Sequence[Run]) -> str:
    """Mean over the rounds of all runs."""
    return f"{statistics.mean(count for run in runs for count in run.messages):.4g}"


def _kilobytes(runs: Sequence[Run]) -> str:
    return f"{statistics.mean(sent for run in runs for sent in run.payloads) / 1000:.1f}"
