"""Finished runs as tools read, name, tabulate and draw them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

DAMAGED = (OSError, ValueError, KeyError, AttributeError, yaml.YAMLError)
"""What reading a damaged run ends in."""
APART = ("seed", "run_dir")
"""Options that do not set two lines of a table apart."""


@dataclass(frozen=True)
class Run:
    """A finished run: its options by dotted name, its records (``metrics.RoundRecord``)."""

    options: Mapping[str, str]
    records: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]

    @property
    def evaluated(self) -> list[Mapping[str, Any]]:
        """Records of the rounds that were evaluated."""
        return [record for record in self.records if record["test_accuracy"] is not None]

    @property
    def accuracy(self) -> float:
        """Of the last round, 0 to 1."""
        return float(self.evaluated[-1]["test_accuracy"])

    @property
    def messages(self) -> list[int]:
        """Collectives of each round, or those that there would be with more ranks."""
        return [int(record["payload_messages"]) for record in self.records]

    @property
    def payloads(self) -> list[int]:
        """Bytes that a rank put into each round's collectives, or would with more ranks."""
        return [int(record["payload_bytes"]) for record in self.records]


def finished(folder: Path) -> bool:
    """Whether the folder holds a run that came to its end."""
    return (folder / "summary.json").exists()


def read(folder: Path) -> Run:
    """The finished run in ``folder``."""
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return Run(
        options=read_options(folder / "config.yaml"),
        records=[json.loads(line) for line in lines],
        summary=json.loads((folder / "summary.json").read_text(encoding="utf-8")),
    )


def read_options(path: Path) -> dict[str, str]:
    """The options in a YAML file, by dotted name."""
    options: Any = OmegaConf.to_container(OmegaConf.load(path))
    return dict(flat(options))


def flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values as text."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)


def best_first(lines: Mapping[str, list[Run]]) -> dict[str, list[Run]]:
    """Lines of a table by the mean of their runs' last accuracies."""
    return dict(
        sorted(lines.items(), key=lambda line: -statistics.mean(run.accuracy for run in line[1]))
    )


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± sample deviation; a single value stands alone."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def band(axes: Any, x: Sequence[float], seeds: Sequence[Sequence[float]], **style: Any) -> Any:
    """Draw the mean of the seeds' curves and the band from their lowest to their highest."""
    columns = list(zip(*seeds, strict=True))
    [line] = axes.plot(x, [statistics.mean(column) for column in columns], **style)
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    return line
