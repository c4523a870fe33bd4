"""What a probe reports: ``probe.jsonl``, one line for each probed round.  Loads without torch.

``probing`` makes the records, ``loggers.ProbeFile`` writes them, and whoever reads them does it
here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..files import atomic_files, reading
from ..files.reading import FileError, unusable
from ..files.typed_values import misfit

NAME = "probe.jsonl"
DISTANCES = ("mean_shift", "log_variance_ratio", "kl_divergence")
"""Fields of a record that have a value for each BN layer and client."""


@dataclass(frozen=True, kw_only=True)
class ProbeRecord:
    """One line of ``probe.jsonl``: all is of the first batches of the round's clients.

    Gradients are taken at the model before the round.  The deviation of a gradient h is
    ||h - g|| / ||g||, where g is the global gradient, with global statistics in both passes; null
    where g is 0 to rounding.  Causes are "forward", "backward" and "both", the passes in which each
    client has statistics of its own, and "trained" for the gradient that the round itself followed.
    """

    round: int
    layers: list[str] = field(default_factory=list)
    """Names of the BN layers, in the order in which the network defines them."""
    clients: list[int] = field(default_factory=list)
    """The participants of the round; of more than 100, those with the 100 lowest numbers."""
    mean_shift: list[list[float]] = field(default_factory=list)
    """By layer and client: |m - mean| / sqrt(variance + eps), mean over channels."""
    log_variance_ratio: list[list[float]] = field(default_factory=list)
    """By layer and client: |log((v + eps) / (variance + eps))|, mean over channels."""
    kl_divergence: list[list[float]] = field(default_factory=list)
    """By layer and client: KL(N(m, v + eps) || N(mean, variance + eps)), mean over channels."""
    parameters: list[str] = field(default_factory=list)
    """Names of the trained parameter tensors, in the order in which the network defines them."""
    gradient_norm: list[float | None] = field(default_factory=list)
    """||g|| of each tensor."""
    deviation: dict[str, list[float | None]] = field(default_factory=dict)
    """By cause, then tensor."""
    cosine: dict[str, list[float | None]] = field(default_factory=dict)
    """By cause, then tensor: of the angle between h and g."""
    total_deviation: dict[str, float | None] = field(default_factory=dict)
    """By cause, of all tensors together."""
    total_cosine: dict[str, float | None] = field(default_factory=dict)
    """By cause, of all tensors together."""
    seconds: float = 0.0
    """Time that the probe took on rank 0; ``round_seconds`` does not have it."""
    messages: int = 0
    """Collectives of the probe, as in payload_messages, which does not have them."""
    bytes: int = 0
    """Bytes that rank 0 put into these."""

    def layer_means(self, distance: str) -> dict[str, float]:
        """Returns one of ``DISTANCES`` for each layer, the mean over the clients in the record."""
        rows: Sequence[Sequence[float]] = getattr(self, distance)
        return {n: sum(row) / len(row) for n, row in zip(self.layers, rows, strict=True) if row}

    def reordered(self, layers: Iterable[str], parameters: Iterable[str]) -> ProbeRecord:
        """Returns the record with layers and tensors in these orders; other names come last."""
        rows, tensors = _order(self.layers, layers), _order(self.parameters, parameters)

        def by_cause(values: Mapping[str, list[float | None]]) -> dict[str, list[float | None]]:
            return {cause: [each[n] for n in tensors] for cause, each in values.items()}

        return replace(
            self,
            layers=[self.layers[n] for n in rows],
            mean_shift=[self.mean_shift[n] for n in rows],
            log_variance_ratio=[self.log_variance_ratio[n] for n in rows],
            kl_divergence=[self.kl_divergence[n] for n in rows],
            parameters=[self.parameters[n] for n in tensors],
            gradient_norm=[self.gradient_norm[n] for n in tensors],
            deviation=by_cause(self.deviation),
            cosine=by_cause(self.cosine),
        )

    def scalars(self) -> dict[str, float]:
        """Returns the figures that curves show, by a path as TensorBoard groups them."""
        named = {
            f"probe_total/{kind}_{cause}": value
            for kind in ("deviation", "cosine")
            for cause, value in getattr(self, f"total_{kind}").items()
        }
        for cause, values in self.deviation.items():
            for name, value in zip(self.parameters, values, strict=True):
                named[f"probe_deviation_{cause}/{name}"] = value
        for distance in DISTANCES:
            for layer, value in self.layer_means(distance).items():
                named[f"probe_{distance}/{layer}"] = value
        return {name: value for name, value in named.items() if value is not None}


def _order(names: Sequence[str], wanted: Iterable[str]) -> list[int]:
    """Returns the indices of ``names`` in the order of ``wanted``."""
    place = {name: number for number, name in enumerate(wanted)}
    return sorted(range(len(names)), key=lambda n: place.get(names[n], len(place)))


def line_of(record: ProbeRecord) -> str:
    """Returns the line of a record in the file."""
    return json.dumps(asdict(record), allow_nan=False) + "\n"


def read(folder: Path, skips_damaged: bool = False) -> Iterator[ProbeRecord]:
    """Yields the records of a run; none if there is no file.

    A last line without an end is left out, as the run is writing it.  Raises ``FileError`` for
    another damaged line, unless ``skips_damaged`` leaves it out too.
    """
    path = folder / NAME
    for number, line in enumerate(reading.lines(path), 1):
        try:
            yield _record(path, reading.json_line(path, line, number), number)
        except FileError:
            if line.endswith(b"\n") and not skips_damaged:
                raise


def carried(source: Path, folder: Path, number: int) -> list[ProbeRecord]:
    """Returns the records of the run in ``source`` until round ``number``.

    The file in ``folder``, where the run goes on, has them and no others then.
    """
    records = {each.round: each for each in read(source, skips_damaged=True)}
    kept = [record for round_number, record in sorted(records.items()) if round_number <= number]
    if records:
        atomic_files.replace_text(folder / NAME, "".join(map(line_of, kept)))
    return kept


def _record(path: Path, values: Any, number: int) -> ProbeRecord:
    if not isinstance(values, Mapping) or "round" not in values:
        raise unusable(path, f"line {number} is no record of a probe")
    known = {each.name for each in fields(ProbeRecord)}
    record = ProbeRecord(**{name: value for name, value in values.items() if name in known})
    if why := misfit(ProbeRecord, vars(record)) or _bad_shape(record):
        raise unusable(path, f"line {number}: {why}")
    return record


def _bad_shape(record: ProbeRecord) -> str:
    """Returns what is wrong with the numbers of a record's values."""
    if record.round < 1:
        return "round is below 1"
    for name in DISTANCES:
        rows = getattr(record, name)
        if len(rows) != len(record.layers) or any(len(row) != len(record.clients) for row in rows):
            return f"{name} has not one value for each layer and client"
    lists = [record.gradient_norm, *record.deviation.values(), *record.cosine.values()]
    if any(len(each) != len(record.parameters) for each in lists):
        return "a list of tensors has not one value for each parameter"
    return ""
