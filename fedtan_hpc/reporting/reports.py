"""Finished runs as the tools read, group and tabulate them."""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..config import schema
from ..config.errors import printable
from ..evaluation import probe_records, saved_records
from ..evaluation.early_stopping import SMALLER_IS_BETTER
from ..evaluation.records import first_metric
from ..files.reading import FileError
from ..job.run_dir import NOT_IDENTIFYING
from ..job.saved import options as saved_options
from . import probe_series
from .probe_series import ProbeSeries

READ_ERRORS = (FileError, OSError)
"""Errors that reading a damaged run raises."""
IGNORED = ("seed",)
"""Options in which runs of one line may differ, beside those that change no result."""
_SHARES = ("accuracy", "recall", "f1", "f1_micro", "iou", "dice", "pixel_accuracy")


@dataclass(frozen=True)
class Measure:
    """The figure by which runs are compared: the first metric of their task."""

    metric: str = "accuracy"
    """Its name in records, without test_; loss if the task has no metric."""

    @classmethod
    def of(cls, lines: Mapping[str, Sequence[Run]]) -> Measure:
        """Returns that of the first run."""
        runs = next(iter(lines.values()), ())
        return cls.of_record(runs[0].evaluated[-1]) if runs else cls()

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Measure:
        """Returns that of an evaluated round."""
        return cls(first_metric(record).removeprefix("test_"))

    @property
    def test(self) -> str:
        """The name in records of the figure on the test set."""
        return f"test_{self.metric}"

    @property
    def own(self) -> str:
        """The name in records of its mean on the clients' own data."""
        return f"clients_own_mix_{self.metric}_mean"

    @property
    def text(self) -> str:
        """The metric in words, with its unit."""
        return self.metric.replace("_", " ") + (", %" if self._is_share else "")

    @property
    def falls(self) -> bool:
        """Whether smaller values are better."""
        return any(word in self.metric for word in SMALLER_IS_BETTER)

    def shown(self, value: Any) -> float:
        """Returns a value in the unit of ``text``; NaN for what is no number."""
        if not isinstance(value, int | float):
            return math.nan
        return 100 * value if self._is_share else value

    def curves(self, runs: Sequence[Run], rounds: Sequence[int]) -> list[list[float]]:
        """Returns the figure on the test set of each run, at these indices of its records."""
        return [[self.shown(run.records[n].get(self.test)) for n in rounds] for run in runs]

    def summary(self, runs: Sequence[Run], figure: str) -> str:
        """Returns mean and deviation of the last values of ``figure``; empty if no run has it."""
        values = [self.shown(value) for value in last_figures(runs, figure)]
        return mean_and_deviation(values, 1 if self._is_share else 4)

    @property
    def _is_share(self) -> bool:
        return self.metric in _SHARES


@dataclass(frozen=True)
class Run:
    """A finished run: its options by dotted name, and its records (``evaluation.RoundRecord``)."""

    options: Mapping[str, str]
    records: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    probes: ProbeSeries | None = None
    """Its probed rounds, if it has any."""

    @property
    def evaluated(self) -> list[Mapping[str, Any]]:
        """Records of the rounds that were evaluated."""
        return [record for record in self.records if record["test_loss"] is not None]

    @property
    def messages(self) -> list[int]:
        """Collectives of each round; in a single process, those of the same run on more ranks."""
        return [int(record["payload_messages"]) for record in self.records]

    @property
    def payloads(self) -> list[int]:
        """Bytes that one rank puts into the collectives of each round, counted as ``messages``."""
        return [int(record["payload_bytes"]) for record in self.records]


Lines: TypeAlias = dict[str, list[Run]]
"""Runs that differ only in the seed, by the label of their line in a table or picture."""


def finished(folder: Path) -> bool:
    """Returns whether the folder holds a finished run."""
    return os.path.lexists(folder / saved_records.SUMMARY)


def read(folder: Path) -> Run:
    """Reads the finished run in ``folder``; raises one of ``READ_ERRORS`` if it is damaged."""
    summary, records = saved_records.finished(folder)
    options = read_options(folder / "config.yaml")
    probes = probe_series.of_records(probe_records.read(folder, skips_damaged=True))
    return Run(options, [record.line() for record in records], asdict(summary), probes)


def read_whole(folders: Iterable[Path]) -> Iterator[Run]:
    """Reads the evaluated runs in ``folders``; skips damaged ones and names them on stderr."""
    for folder in folders:
        try:
            run = read(folder)
            if run.evaluated and run.messages and run.payloads:
                yield run
        except READ_ERRORS as error:
            reason = " ".join(str(error).split())
            line = f"left out, because it cannot be read: {folder} ({reason})"
            print(printable(line), file=sys.stderr)


def read_options(path: Path) -> dict[str, str]:
    """Returns the options in a YAML file by dotted name, with defaults for those that it lacks.

    Raises one of ``READ_ERRORS``.
    """
    return dict(flat(saved_options.read(path)))


def flat(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the dotted name and the text of each option of a nested mapping; null is "None".

    Leaves out the options that change no result.
    """
    for name, value in schema.flat(options):
        if name.partition(".")[0] not in NOT_IDENTIFYING:
            yield name, str(value)


def evaluated_together(runs: Sequence[Run]) -> list[int]:
    """Returns the indices of the records that all runs have evaluated; some may end early."""
    together = enumerate(zip(*(run.records for run in runs), strict=False))
    return [n for n, each in together if all(r["test_loss"] is not None for r in each)]


def best_first(lines: Lines) -> Lines:
    """Returns the lines by the mean of their runs' last figures; those without one stand last."""
    measure = Measure.of(lines)
    sign = 1 if measure.falls else -1

    def rank(line: tuple[str, list[Run]]) -> float:
        values = last_figures(line[1], measure.test)
        return sign * statistics.mean(values) if values else float("inf")

    return dict(sorted(lines.items(), key=rank))


def last_figures(runs: Sequence[Run], figure: str) -> list[float]:
    """Returns a figure of the last evaluated round of each run that has it."""
    values = [run.evaluated[-1].get(figure) for run in runs]
    return [float(value) for value in values if isinstance(value, int | float)]


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """Returns ``mean ± sample deviation``, the mean alone for one value, and nothing for none."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a table in Markdown, each printable."""
    return [
        f"| {' | '.join(map(printable, row))} |" for row in (heads, ["---"] * len(heads), *rows)
    ]
