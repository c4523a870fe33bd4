"""The curves of a comparison: accuracy and loss, against rounds and against megabytes."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config.enums import AlgorithmName
from ..runtime import atomic_files
from .reports import Run, band

_LOOKS = {
    "fedtan": ("#0072B2", "o"),
    "fedavg": ("#D55E00", "s"),
    "centralised": ("#000000", "D"),
    "fedavg_gn": ("#009E73", "^"),
    "fedavg_ln": ("#56B4E9", "v"),
    "fedbn": ("#CC79A7", "P"),
    "silobn": ("#E69F00", "X"),
    "fixbn": ("#882255", "<"),
    "fbn": ("#999933", ">"),
    "hbn": ("#332288", "p"),
    "singleset": ("#7F7F7F", "h"),
}
"""Colour (told apart by colour-blind readers with the marker's help) and marker of an algorithm."""
_DASHES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))
"""Of an algorithm's variants; dotted is who sends nothing."""
_LONGEST_LABEL = 50
"""Letters of a line in the legend."""
_WIDE_BYTES, _WIDE_LOSS = 3.0, 8.0
"""Ratios of largest to smallest from which the axis is logarithmic."""


def look_of(algorithm: str) -> tuple[str, str]:
    """Colour and marker of an algorithm, the same in all pictures."""
    return _LOOKS[algorithm]


class Curve(NamedTuple):
    """A method: rounds, megabytes until then, and for each seed a value for each round."""

    label: str
    rounds: list[int]
    megabytes: list[float]
    values: dict[str, list[list[float]]]
    style: dict[str, Any]


def draw(lines: Mapping[str, Sequence[Run]], title: str, out: Path) -> None:
    """Write ``compare.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sum(1 + len(label) // _LONGEST_LABEL for label in lines)
    figure, panels = pyplot.subplots(
        2, 2, figsize=(11, 7.5 + 0.1 * rows), sharex="col", sharey="row", layout="constrained"
    )
    curves = _curves(lines)
    for row, (name, text) in enumerate((("accuracy", "test accuracy, %"), ("loss", "test loss"))):
        for curve in curves:
            _draw(panels[row], curve, name)
        panels[row][0].set_ylabel(text)
    _axes(panels, curves)
    handles, labels = panels[0][0].get_legend_handles_labels()
    labels = [textwrap.fill(label, _LONGEST_LABEL) for label in labels]
    most = max(len(runs) for runs in lines.values())
    note = "mean; band from worst to best seed" if most > 1 else None
    figure.legend(handles, labels, loc="outside lower center", ncols=_columns(labels), title=note)
    figure.suptitle(title)
    atomic_files.replace(
        out / "compare.png", lambda path: figure.savefig(path, dpi=150, format="png")
    )
    pyplot.close(figure)


def _curves(lines: Mapping[str, Sequence[Run]]) -> list[Curve]:
    order = [str(name) for name in AlgorithmName]
    labels = sorted(lines, key=lambda label: (order.index(label.partition(",")[0]), label))
    variants: dict[str, int] = {}
    curves = []
    for label in labels:
        algorithm = label.partition(",")[0]
        variant = variants[algorithm] = variants.get(algorithm, -1) + 1
        curves.append(_curve(label, lines[label], _style(algorithm, variant)))
    return curves


def _style(algorithm: str, variant: int) -> dict[str, Any]:
    colour, marker = _LOOKS.get(algorithm, ("#666666", "*"))
    filled = colour if variant == 0 else "white"
    return {
        "color": colour,
        "linestyle": _DASHES[variant % len(_DASHES)],
        "marker": marker,
        "markersize": 5,
        "markerfacecolor": filled,
    }


def _curve(label: str, runs: Sequence[Run], style: dict[str, Any]) -> Curve:
    """The rounds that all seeds have."""
    sent = [list(itertools.accumulate(run.payloads)) for run in runs]
    places = [n for n, r in enumerate(runs[0].records) if r["test_accuracy"] is not None]
    values = {
        "accuracy": [[100 * run.records[n]["test_accuracy"] for n in places] for run in runs],
        "loss": [[run.records[n]["test_loss"] for n in places] for run in runs],
    }
    megabytes = [statistics.mean(bytes_[n] for bytes_ in sent) / 1e6 for n in places]
    rounds = [runs[0].records[n]["round"] for n in places]
    return Curve(label, rounds, megabytes, values, style)


def _draw(panels: Sequence[Any], curve: Curve, name: str) -> None:
    """Into the panels against rounds and against bytes."""
    every = max(1, len(curve.rounds) // 8)
    style = {**curve.style, "markevery": every, "label": curve.label}
    band(panels[0], curve.rounds, curve.values[name], **style)
    if curve.megabytes[-1] > 0:
        band(panels[1], curve.megabytes, curve.values[name], **style)
    else:  # nothing is sent: a level to compare with
        last = statistics.mean(values[-1] for values in curve.values[name])
        panels[1].axhline(last, color=curve.style["color"], linestyle=":", linewidth=1)


def _axes(panels: Any, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    sent = [curve.megabytes[-1] for curve in curves if curve.megabytes[-1] > 0]
    losses = [v for curve in curves for values in curve.values["loss"] for v in values if v > 0]
    if sent and max(sent) > _WIDE_BYTES * min(sent):
        panels[1][1].set_xscale("log")
        _numbers(panels[1][1].xaxis)
    if losses and max(losses) > _WIDE_LOSS * min(losses):
        panels[1][0].set_yscale("log")
        _numbers(panels[1][0].yaxis)
    silent = "; dotted: nothing is sent" if len(sent) < len(curves) else ""
    panels[1][0].set_xlabel("round")
    panels[1][1].set_xlabel(f"megabytes that a rank has put in{silent}")
    panels[1][0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels.flat:
        panel.grid(alpha=0.3)


def _numbers(axis: Any) -> None:
    """0.1, 0.2, 0.5, 1 on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _columns(labels: Sequence[str]) -> int:
    """As many as fit side by side."""
    widest = max(len(line) for label in labels for line in label.split("\n"))
    return max(1, min(len(labels), 110 // (widest + 8)))
