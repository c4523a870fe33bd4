"""Heat maps of probes: layers or tensors against rounds, a column for each method.

``compare`` draws them of all methods, ``tools/probe.py`` of one saved model.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluation.probe_records import DISTANCES
from . import pictures
from .probe_series import CAUSES, KINDS, ProbeSeries, Value

FILES = ("probe.png", *(f"probe_{kind}.png" for kind in KINDS))
"""The pictures: curves and layers; deviations of tensors; cosines of tensors."""
_TEXTS = {
    "mean_shift": "mean shift",
    "log_variance_ratio": "|log variance ratio|",
    "kl_divergence": "KL divergence",
}
_LINES: Mapping[str, pictures.Style] = {
    "forward": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "backward": {"color": "#D55E00", "linestyle": "-", "marker": "s"},
    "both": {"color": "#000000", "linestyle": "-", "marker": "D"},
    "trained": {"color": "#009E73", "linestyle": "--", "marker": "^", "markerfacecolor": "white"},
}
_LOG_RATIO = 30.0
"""Ratio of the largest to the smallest positive value above which a scale is logarithmic."""
_LOG_RANGE = 1e3
"""Ratio of the ends of a logarithmic scale; smaller values have the colour of its lower end."""
_COLUMN, _CURVES, _LOW, _HIGH = 2.3, 1.7, 1.25, 3.2
"""Inches: width of a panel, height of the curves, least and greatest height of a heat map."""
_LABEL_INCHES, _NAME_LETTERS, _TITLE_LETTERS = 0.13, 24, 24


class Scale(NamedTuple):
    """The ends of a row's colours, which all methods share."""

    low: float
    high: float
    is_log: bool
    is_cut: bool
    """Whether smaller values have the colour of ``low``."""

    @classmethod
    def of(cls, values: Sequence[Value], is_cosine: bool = False) -> "Scale":
        """Returns the scale for values that are not negative, or for cosines."""
        known = [value for value in values if value is not None]
        low, high = min(known, default=0.0), max(known, default=1.0)
        if is_cosine:
            return cls(min(low, 0.9), 1.0, False, False)
        positive = [value for value in known if value > 0]
        if positive and high > _LOG_RATIO * min(positive):
            end = max(min(positive), high / _LOG_RANGE)
            return cls(end, high, True, low < end)
        return cls(0.0, high or 1.0, False, False)


def draw(methods: Mapping[str, ProbeSeries], out: Path) -> None:
    """Writes ``FILES`` into ``out``; a method is a column, under its label."""
    layers, *tensors = (out / name for name in FILES)
    has_layers = any(series.layers for series in methods.values())
    _draw(methods, list(DISTANCES) if has_layers else [], layers, has_curves=True)
    for kind, path in zip(KINDS, tensors, strict=True):
        names = [f"{kind} {cause}" for cause in CAUSES]
        known = [name for name in names if any(name in each.values for each in methods.values())]
        _draw(methods, known, path, has_curves=False)


def _draw(
    methods: Mapping[str, ProbeSeries], quantities: Sequence[str], path: Path, has_curves: bool
) -> None:
    most = max(len(s.names(q)) for s in methods.values() for q in quantities or ["deviation"])
    inches = min(_HIGH, max(_LOW, 1.2 * _LABEL_INCHES * most))
    heights = [*([_CURVES] if has_curves else []), *[inches] * len(quantities)]
    options = {
        "squeeze": False,
        "figsize": (2.6 + _COLUMN * len(methods), sum(heights) + 0.35 * len(heights) + 0.3),
        "gridspec_kw": {"height_ratios": heights},
    }
    with pictures.picture(path, len(heights), len(methods), **options) as (figure, panels):
        for axes, label in zip(panels[0], methods, strict=True):
            axes.set_title(textwrap.fill(label, _TITLE_LETTERS), fontsize=9)
        every = list(methods.values())
        for row, quantity in zip(panels[int(has_curves) :], quantities, strict=True):
            _heat_maps(figure, row, every, quantity, inches)
        for axes in panels[-1]:
            axes.set_xlabel("round", fontsize=8)
        if has_curves:
            _curves(panels[0], every)
            pictures.legend_beside(figure, panels[0][0], "cause")


def _curves(row: Sequence[Any], methods: Sequence[ProbeSeries]) -> None:
    """Draws the total deviation by cause; all methods have one axis."""
    names = {f"deviation {cause}": cause for cause in CAUSES}
    totals = [value for each in methods for name in names for value in each.totals.get(name, [])]
    scale = Scale.of(totals)
    for axes, series in zip(row, methods, strict=True):
        for name, cause in names.items():
            shown = [_shown(value, scale) for value in series.totals.get(name, [])]
            if shown:
                style = {"markevery": max(1, len(shown) // 6), **_LINES[cause]}
                axes.plot(series.rounds, shown, label=cause, **style)
        if scale.is_log:
            axes.set_yscale("log")
        margin = 1.15 if scale.is_log else 1.05
        axes.set_ylim(scale.low / (margin if scale.is_log else 1), scale.high * margin)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        axes.tick_params(labelsize=8)
        axes.label_outer()
        axes.tick_params(labelbottom=True)
    row[0].set_ylabel("total deviation", fontsize=8)


def _heat_maps(
    figure: Any, row: Sequence[Any], methods: Sequence[ProbeSeries], quantity: str, inches: float
) -> None:
    """Draws one quantity of all methods with one scale of colours."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    is_cosine = quantity.startswith("cosine")
    values = [v for each in methods for line in each.values.get(quantity, []) for v in line]
    scale = Scale.of(values, is_cosine)
    norm = (LogNorm if scale.is_log else Normalize)(scale.low, scale.high)
    colours = colormaps["viridis_r" if is_cosine else "viridis"].with_extremes(bad="#D9D9D9")
    for number, (axes, series) in enumerate(zip(row, methods, strict=True)):
        names, grid = series.names(quantity), series.values.get(quantity, [])
        axes.grid(visible=False)
        axes.tick_params(labelsize=7)
        if not grid:
            axes.set_axis_off()
            continue
        shown = [[_shown(value, scale) for value in line] for line in grid]
        image = axes.imshow(shown, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
        is_named = number == 0 or names != methods[number - 1].names(quantity)
        _label_axes(axes, series.rounds, names if is_named else [], inches)
    bar = figure.colorbar(image, ax=list(row), extend="min" if scale.is_cut else "neither")
    kind, _, cause = quantity.partition(" ")
    bar.set_label(_TEXTS.get(quantity, f"{kind}, {cause}"), fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _label_axes(axes: Any, rounds: Sequence[int], names: Sequence[str], inches: float) -> None:
    """Labels some rounds, and every n-th name so that names do not overlap."""
    step = math.ceil(len(rounds) / 5)
    axes.set_xticks(range(0, len(rounds), step), rounds[::step])
    step = max(1, math.ceil(len(names) * _LABEL_INCHES / inches))
    axes.set_yticks(range(0, len(names), step), [short(name) for name in names[::step]])


def short(name: str) -> str:
    """Returns the name of a layer or tensor with at most some letters; its end stays."""
    if len(name) <= _NAME_LETTERS:
        return name
    kept = _NAME_LETTERS - 1
    return f"{name[: kept // 3]}…{name[-(kept - kept // 3) :]}"


def _shown(value: Value, scale: Scale) -> float:
    """Returns what is drawn: NaN for null, and on a logarithmic scale at least its lower end."""
    if value is None:
        return math.nan
    return max(value, scale.low) if scale.is_log else value
