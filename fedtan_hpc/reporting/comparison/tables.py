"""A comparison as a table in Markdown and as rows for other programs; used by ``compare``."""

import csv
import io
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...config.enums import ModelSource
from ...config.schema import Config
from ...files import atomic_files
from .. import probe_plots, probe_series, reports
from ..probe_series import ProbeSeries
from ..reports import Lines, Measure, Run
from . import members
from .members import Comparison

_FIGURES = (
    "train_loss",
    "pooled_train_loss",
    "test_{0}",
    "test_loss",
    "clients_test_{0}_mean",
    "clients_test_{0}_spread",
    "clients_own_mix_{0}_mean",
    "clients_own_mix_{0}_spread",
)
"""Names of figures in records, with {0} for the metric by which runs are compared."""


def write_csv(lines: Lines, path: Path) -> None:
    """Writes a row for each evaluated round; ``payload_bytes`` is the sum of all rounds so far."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = list(dict.fromkeys(name.format(Measure.of(lines).metric) for name in _FIGURES))
    writer.writerow(["method", "seed", "round", "payload_bytes", *figures])
    for label, runs in lines.items():
        for run in runs:
            writer.writerows([label, run.options["seed"], *row] for row in _csv_rows(run, figures))
    atomic_files.replace_text(path, text.getvalue())


def _csv_rows(run: Run, figures: Sequence[str]) -> Iterator[list[Any]]:
    for record, sent in zip(run.records, itertools.accumulate(run.payloads), strict=True):
        if record["test_loss"] is not None:
            yield [record["round"], sent, *(record.get(name) for name in figures)]


def table(lines: Lines) -> list[str]:
    """Returns the last round of each method, mean ± sample deviation over the seeds; best first."""
    measure = Measure.of(lines)
    figures = [measure.test, *([measure.own] if _with(measure.own, lines) else [])]
    texts = [f"test {measure.text}", f"clients' own {measure.text}"][: len(figures)]
    heads = ["method", "seeds", *texts, "test loss", "messages a round", "kB a round"]
    rows = (
        _row(label, runs, [measure.summary(runs, figure) for figure in figures])
        for label, runs in lines.items()
    )
    return reports.markdown_table(heads, rows)


def _row(label: str, runs: Sequence[Run], figures: Sequence[str]) -> list[str]:
    messages = statistics.mean(count for run in runs for count in run.messages)
    kilobytes = statistics.mean(sent for run in runs for sent in run.payloads) / 1000
    return [
        label,
        str(len(runs)),
        *figures,
        reports.mean_and_deviation(reports.last_figures(runs, "test_loss"), 3),
        f"{messages:.4g}",
        f"{kilobytes:.1f}",
    ]


def write_markdown(rows: Sequence[str], lines: Lines, comparison: Comparison, command: str) -> None:
    """Writes ``compare.md``: the table, the command, and what the columns mean."""
    missing = [comparison.name_of(config) for config in comparison.unfinished]
    unrequested = members.unrequested(comparison, lines)
    measure = Measure.of(lines)
    personal = _with(f"clients_test_{measure.metric}_mean", lines)
    has_own = _with(measure.own, lines)
    runs = [run for runs in lines.values() for run in runs]
    rounds = sorted({len(run.records) for run in runs})
    text = [
        f"# {title(comparison.settings)}",
        f"    {command}",
        f"Settings: {_settings(comparison)}.  All of them are in `settings.yaml`.",
        "\n".join(rows),
        f"After {_interval(rounds)} rounds: mean ± sample deviation over the seeds.  Messages and "
        "kB: collectives of a round and what one rank puts into them.",
        *([f"{', '.join(personal)}: {_OWN_MODELS}"] if personal else []),
        *([f"Clients' own {measure.text.removesuffix(', %')}: {_OWN_DATA}"] if has_own else []),
        *([f"Not finished: {', '.join(missing)}."] if missing else []),
        *([f"Run by other commands: {', '.join(unrequested)}."] if unrequested else []),
        *dict.fromkeys(_machine(run) for run in runs),
        f"![Test {measure.text.removesuffix(', %')} and loss against rounds and megabytes]"
        "(compare.png)",
        *_probe_text(lines),
    ]
    atomic_files.replace_text(comparison.out / "compare.md", "\n\n".join(text) + "\n")


def probes(lines: Lines) -> dict[str, ProbeSeries]:
    """Returns the probes of each method that has some, means over its seeds."""
    means = {
        label: probe_series.mean_of([run.probes for run in runs if run.probes is not None])
        for label, runs in lines.items()
    }
    return {label: series for label, series in means.items() if series is not None}


def _probe_text(lines: Lines) -> list[str]:
    """Returns the paragraphs of the probes; none if no run has any."""
    probed = [run.probes for runs in lines.values() for run in runs if run.probes is not None]
    rounds = probe_series.rounds_of_all(probed)
    rows = [
        row
        for label, runs in lines.items()
        for cause in probe_series.CAUSES
        if (row := _probe_row(label, runs, cause, rounds))
    ]
    if not probed:
        return []
    heads = ["method", "cause", "mean total deviation", "mean total cosine"]
    table = ["\n".join(reports.markdown_table(heads, rows)), _PROBES]
    return [
        *(table if rows else ["Probes: no round was probed in all runs."]),
        *(f"![{text}]({name})" for text, name in zip(_PICTURES, probe_plots.FILES, strict=True)),
    ]


def _probe_row(label: str, runs: Sequence[Run], cause: str, rounds: set[int]) -> list[str]:
    """Returns a row of means over ``rounds``, ± over the seeds; empty if none is known."""
    columns = [
        [run.probes.total_mean(f"{kind} {cause}", rounds) for run in runs if run.probes is not None]
        for kind in probe_series.KINDS
    ]
    cells = [
        reports.mean_and_deviation([each for each in column if each is not None], 3)
        for column in columns
    ]
    return [label, cause, *cells] if any(cells) else []


_PROBES = (
    "Probes: how far the clients' mean gradient h is from the global gradient g.  Cause: the pass "
    "or passes with statistics of the client; trained is the gradient that the round followed.  "
    "Deviation ||h - g|| / ||g||, cosine of the angle between h and g: means over the rounds "
    "that all runs have probed, ± over the seeds."
)
_PICTURES = (
    "Total deviation, and distances of the clients' statistics by layer and round",
    "Deviation by tensor and round",
    "Cosine by tensor and round",
)
_OWN_MODELS = "there is no one global model; the figures are means over the clients' models."
_OWN_DATA = (
    "mean over the clients, each on its own test samples, or else on test samples in the mix of "
    "classes of its training data."
)


def title(settings: Mapping[str, str]) -> str:
    """Returns the data, the network, the partition and the work of a round in one line."""
    network = settings["model.name"]
    if settings["model.source"] == ModelSource.import_:
        network = settings["model.target"].rpartition(":")[2]
    names = [settings["data.name"], network, settings["partition.name"]]
    clients = [f"{settings['clients']} clients"] if "clients" in settings else []  # not if natural
    epochs = settings["local_epochs"]
    steps = f"{settings['local_steps']} local steps" if epochs == "None" else f"{epochs} epochs"
    return ", ".join([*names, *clients, steps])


def _interval(numbers: Sequence[int]) -> str:
    low, high = numbers[0], numbers[-1]
    return str(low) if low == high else f"{low} to {high}"


def _machine(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.summary["versions"].items())
    ranks, device = run.summary["world_size"], run.summary["device"]
    return f"Ranks {ranks}, device {device}, {versions}."


def _settings(comparison: Comparison) -> str:
    """Names the shared options that differ from the defaults."""
    defaults = members.shared_options(Config())
    settings = comparison.settings.items()
    words = [f"`{name}={value}`" for name, value in settings if defaults.get(name) != value]
    return ", ".join(words) if words else "the defaults"


def _with(figure: str, lines: Lines) -> list[str]:
    """Returns the methods whose runs have ``figure``."""
    return [label for label, runs in lines.items() if reports.last_figures(runs, figure)]
