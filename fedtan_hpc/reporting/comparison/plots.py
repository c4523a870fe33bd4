"""The curves of a comparison: a metric and the loss, against rounds and against megabytes.

Used by ``compare``.
"""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...config.enums import AlgorithmName
from .. import pictures, reports
from ..reports import Lines, Measure, Run

_LOG_BYTES_RATIO, _LOG_LOSS_RATIO = 3.0, 8.0
"""Ratios of the largest to the smallest value above which an axis is logarithmic."""


class Curve(NamedTuple):
    """A method: evaluated rounds, megabytes sent until each, and values by figure, seed, round."""

    label: str
    rounds: list[int]
    megabytes: list[float]
    values: dict[str, list[list[float]]]
    style: pictures.Style


def draw(lines: Lines, out: Path) -> None:
    """Writes ``compare.png`` into ``out``."""
    shape = {"sharex": "col", "sharey": "row", "figsize": (10, 6.5)}
    with pictures.picture(out / "compare.png", 2, 2, **shape) as (figure, panels):
        measure = Measure.of(lines)
        curves = _curves(lines, measure)
        figures = (("metric", f"test {measure.text}"), ("loss", "test loss"))
        for row, (name, text) in zip(panels, figures, strict=True):
            for curve in curves:
                _draw(row, curve, name)
            row[0].set_ylabel(text)
        _axes(panels, curves)
        several = any(len(runs) > 1 for runs in lines.values())
        note = "mean; band from worst to best seed" if several else None
        pictures.legend_beside(figure, panels[0][0], note)


def _curves(lines: Lines, measure: Measure) -> list[Curve]:
    order = [str(name) for name in AlgorithmName]
    labels = sorted(lines, key=lambda label: (order.index(label.partition(",")[0]), label))
    looks = zip(labels, pictures.styles(labels), strict=True)
    return [_curve(label, lines[label], style, measure) for label, style in looks]


def _curve(label: str, runs: Sequence[Run], style: pictures.Style, measure: Measure) -> Curve:
    sent = [list(itertools.accumulate(run.payloads)) for run in runs]
    indices = reports.evaluated_together(runs)
    values = {
        "metric": measure.curves(runs, indices),
        "loss": [[run.records[n]["test_loss"] for n in indices] for run in runs],
    }
    megabytes = [statistics.mean(bytes_[n] for bytes_ in sent) / 1e6 for n in indices]
    rounds = [runs[0].records[n]["round"] for n in indices]
    return Curve(label, rounds, megabytes, values, style)


def _draw(panels: Sequence[Any], curve: Curve, name: str) -> None:
    """Draws a figure against rounds in the first panel and against megabytes in the second."""
    style = {**curve.style, "label": curve.label}
    pictures.band(panels[0], curve.rounds, curve.values[name], **style)
    if curve.megabytes[-1] > 0:
        pictures.band(panels[1], curve.megabytes, curve.values[name], **style)
    else:  # the method sends nothing: its last value is a level to compare with
        last = statistics.mean(values[-1] for values in curve.values[name])
        panels[1].axhline(last, color=curve.style["color"], linestyle=":", linewidth=1)


def _axes(panels: Any, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    sent = [curve.megabytes[-1] for curve in curves if curve.megabytes[-1] > 0]
    losses = [v for curve in curves for values in curve.values["loss"] for v in values if v > 0]
    if sent and max(sent) > _LOG_BYTES_RATIO * min(sent):
        panels[1][1].set_xscale("log")
        _format_log_axis(panels[1][1].xaxis)
    if losses and max(losses) > _LOG_LOSS_RATIO * min(losses):
        panels[1][0].set_yscale("log")
        _format_log_axis(panels[1][0].yaxis)
    dotted = "; dotted: nothing is sent" if len(sent) < len(curves) else ""
    panels[1][0].set_xlabel("round")
    panels[1][1].set_xlabel(f"sent by a rank since the first round, MB{dotted}")
    panels[1][0].xaxis.set_major_locator(MaxNLocator(integer=True))


def _format_log_axis(axis: Any) -> None:
    """Puts the numbers 0.1, 0.2, 0.5, 1, ... on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
