"""What ``rounds.jsonl`` and ``summary.json`` hold: read, with the type of each field checked.

All that reads a run does it here: the job that goes on, the lists, comparisons and ``load_model``.
Loads without torch.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..files import reading
from ..files.reading import FileError, unusable
from ..files.typed_values import fits, misfit
from .records import Metrics, RoundRecord, Summary

ROUNDS, SUMMARY = "rounds.jsonl", "summary.json"
_LARGEST_SAMPLE = 2**28
"""Values of one sample, 1 GiB in float32."""


def rounds(folder: Path, skips_damaged: bool = False) -> Iterator[RoundRecord]:
    """Yields the records of a run; none if there is no file.

    A last line without an end is left out: the run is writing it, or was ended then.  Raises
    ``FileError`` for another damaged line, unless ``skips_damaged`` leaves it out too.
    """
    path = folder / ROUNDS
    for number, line in enumerate(reading.lines(path), 1):
        try:
            yield _record(path, line, number)
        except FileError:
            if line.endswith(b"\n") and not skips_damaged:
                raise


def _record(path: Path, line: bytes, number: int) -> RoundRecord:
    values = reading.json_line(path, line, number)
    if not isinstance(values, dict):
        raise unusable(path, f"line {number} is no JSON object")
    try:
        record = RoundRecord.of_line(values)
    except TypeError as error:  # a field is missing
        raise unusable(path, f"line {number} is no record of a round ({error})") from error
    why = misfit(RoundRecord, vars(record)) or _bad_metric(record.metrics)
    if why or record.round < 1:
        raise unusable(path, f"line {number}: {why or 'round is below 1'}")
    return record


def _bad_metric(metrics: Metrics) -> str:
    for name, value in metrics.items():
        if not _is_figure(value):
            return f"{name} is {repr(value)[:80]}, not a number or a list of numbers"
    return ""


def _is_figure(value: Any) -> bool:
    """Returns whether ``value`` is a number, null or a list of figures."""
    if isinstance(value, list):
        return all(map(_is_figure, value))
    return fits(value, float | None)


def summary(folder: Path) -> Summary:
    """Returns the summary of a finished run.

    Fields that an older version did not write have their defaults.  Raises ``FileNotFoundError``
    and ``FileError``.
    """
    path = folder / SUMMARY
    values = reading.read_json_object(path)
    known = {each.name for each in fields(Summary)}
    try:
        result = Summary(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:  # a field is missing
        raise unusable(path, f"it is no summary of a run ({error})") from error
    why = misfit(Summary, vars(result)) or _bad_metric(result.metrics) or _bad_data(result.data)
    if why:
        raise unusable(path, why)
    return result


def finished(folder: Path) -> tuple[Summary, list[RoundRecord]]:
    """Returns the summary of a finished run and the records of all its rounds.

    Raises ``FileNotFoundError`` and ``FileError``, also for rounds that are missing.
    """
    result, records = summary(folder), list(rounds(folder))
    if [record.round for record in records] != list(range(1, result.rounds + 1)):
        why = f"its {len(records)} rounds are not the {result.rounds} of {SUMMARY}"
        raise unusable(folder / ROUNDS, why)
    return result, records


def _bad_data(data: dict[str, Any]) -> str:
    """Returns what is wrong with the description of the data, of which the network is made."""
    if not data:
        return ""
    checks: dict[str, Callable[[Any], bool]] = {
        "classes": lambda value: fits(value, int) and 0 < value < 2**31,
        "class_names": lambda value: fits(value, list[str] | None),
        "shape": _is_shape,
        "normalisation": lambda value: value is None or _are_moments(value),
    }
    for name, is_right in checks.items():
        if not is_right(data.get(name)):
            return f"data.{name} is {repr(data.get(name))[:80]}, which no run writes"
    return ""


def _are_moments(moments: Any) -> bool:
    is_pair = fits(moments, dict[str, list[float]]) and moments.keys() == {"mean", "deviation"}
    return is_pair and 0 not in moments["deviation"]


def _is_shape(shape: Any) -> bool:
    """Returns whether ``shape``, sizes or shapes of several inputs, has few enough values."""
    if isinstance(shape, dict):
        return bool(shape) and all(map(_is_shape, shape.values()))
    if not isinstance(shape, list):
        return False
    if any(isinstance(each, list | dict) for each in shape):
        return all(map(_is_shape, shape))
    are_sizes = all(fits(size, int) and 0 < size <= _LARGEST_SAMPLE for size in shape)
    return are_sizes and math.prod(shape) <= _LARGEST_SAMPLE
