"""The probes of a run as tables of rounds and names, small enough to hold for many runs.

``probe_plots`` draws them and ``comparison.tables`` lists their means.  Loads without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..evaluation.probe_records import DISTANCES, ProbeRecord

Value: TypeAlias = float | None
Grid: TypeAlias = list[list[Value]]
"""By name of a layer or tensor, then by round."""

CAUSES = ("forward", "backward", "both", "trained")
"""Causes of a deviation, as records name them."""
KINDS = ("deviation", "cosine")
"""Figures that a record has by cause."""


@dataclass(frozen=True)
class ProbeSeries:
    """The probed rounds of a run, or their means over runs that differ only in the seed."""

    rounds: list[int]
    layers: list[str]
    """BN layers, in the order of the network."""
    parameters: list[str]
    """Trained tensors, in the order of the network."""
    values: Mapping[str, Grid]
    """By quantity: ``DISTANCES`` of the layers (means over the clients), and ``KINDS`` of the
    tensors with a cause, such as "deviation forward"."""
    totals: Mapping[str, list[Value]]
    """By kind and cause, then round: of all tensors together."""

    def names(self, quantity: str) -> list[str]:
        """Returns the names of the rows that ``values`` has for a quantity."""
        return self.layers if quantity in DISTANCES else self.parameters

    def total_mean(self, name: str, rounds: set[int]) -> Value:
        """Returns the mean of a total over those of ``rounds`` in which it is known, or null."""
        totals = zip(self.rounds, self.totals.get(name, ()), strict=False)
        return mean_of_known(value for number, value in totals if number in rounds)


def of_records(records: Iterable[ProbeRecord]) -> ProbeSeries | None:
    """Returns the series of a run, ascending by round; None if there is no record.

    Records with other tensors than the last one, or other layers, are left out; a record may have
    no layers, where the probe has not measured their distances.
    """
    rows: dict[int, _Row] = {}
    layers: list[str] = []
    parameters: list[str] = []
    for record in records:
        is_other = layers and record.layers and record.layers != layers
        if is_other or record.parameters != parameters:
            layers, parameters, rows = [], record.parameters, {}
        layers = record.layers or layers
        rows[record.round] = _Row.of(record)
    if not rows:
        return None
    ordered = sorted(rows.items())
    sizes = dict.fromkeys(DISTANCES, len(layers))
    known = [f"{kind} {cause}" for kind in KINDS for cause in CAUSES]
    sizes |= {
        name: len(parameters) for name in known if any(name in r.totals for r in rows.values())
    }
    values = {
        name: [[_at(row.values.get(name), n) for _, row in ordered] for n in range(size)]
        for name, size in sizes.items()
    }
    totals = {name: [row.totals.get(name) for _, row in ordered] for name in sizes if name in known}
    return ProbeSeries([number for number, _ in ordered], layers, parameters, values, totals)


@dataclass(frozen=True)
class _Row:
    """The figures of one record: by quantity, then name; and by kind and cause."""

    values: dict[str, list[Value]]
    totals: dict[str, Value]

    @classmethod
    def of(cls, record: ProbeRecord) -> _Row:
        values: dict[str, list[Value]] = {}
        for distance in DISTANCES:
            means = record.layer_means(distance)
            if record.layers:
                values[distance] = [means.get(name) for name in record.layers]
        totals = {}
        for kind in KINDS:
            for cause, of_tensors in getattr(record, kind).items():
                values[f"{kind} {cause}"] = list(of_tensors)
                totals[f"{kind} {cause}"] = getattr(record, f"total_{kind}").get(cause)
        return cls(values, totals)


def rounds_of_all(runs: Sequence[ProbeSeries]) -> set[int]:
    """Returns the rounds that all runs have; none without a run."""
    return set.intersection(*(set(run.rounds) for run in runs)) if runs else set()


def mean_of(runs: Sequence[ProbeSeries]) -> ProbeSeries | None:
    """Returns the mean over runs, of the rounds that all have; None if there are none.

    A run with other layers or tensors than the first is left out; so are values that are null.
    """
    alike = [
        run for run in runs if (run.layers, run.parameters) == (runs[0].layers, runs[0].parameters)
    ]
    together = rounds_of_all(alike)
    if not together:
        return None
    first, picks = alike[0], [_indices(run.rounds, together) for run in alike]

    def mean(rows: Sequence[Sequence[Value]]) -> list[Value]:
        chosen = [[row[n] for n in pick] for row, pick in zip(rows, picks, strict=True)]
        return [mean_of_known(column) for column in zip(*chosen, strict=True)]

    values = {
        name: [
            mean([run.values[name][number] for run in alike if name in run.values])
            for number in range(len(first.names(name)))
        ]
        for name in first.values
        if all(name in run.values for run in alike)
    }
    totals = {
        name: mean([run.totals[name] for run in alike])
        for name in first.totals
        if all(name in run.totals for run in alike)
    }
    return ProbeSeries(sorted(together), first.layers, first.parameters, values, totals)


def mean_of_known(values: Iterable[Value]) -> Value:
    """Returns the mean of those values that are not null; null if all are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _indices(rounds: Sequence[int], chosen: set[int]) -> list[int]:
    return [n for n, number in enumerate(rounds) if number in chosen]


def _at(values: Sequence[Value] | None, number: int) -> Value:
    return None if values is None else values[number]
