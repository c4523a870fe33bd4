"""The style of all pictures: colours, markers, line styles, bands over seeds, and legends that fit.

Used by ``comparison``, ``summarise``, ``show_partition`` and the scaling tools.
"""

import statistics
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from ..files import atomic_files

Style: TypeAlias = dict[str, Any]
"""Keyword arguments of ``Axes.plot``."""

GREY = "#7F7F7F"
"""Colour of lines and bars that are no method."""
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.titlesize": 11,
    "legend.fontsize": 9,
    "legend.title_fontsize": 9,
    "legend.frameon": False,
    "legend.borderpad": 0.8,
    "legend.handlelength": 2.6,  # a whole period of each line style
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
}
_COLOURS = (
    *("#0072B2", "#E69F00", "#000000", "#D55E00"),
    *("#882255", "#56B4E9", "#009E73", "#CC79A7"),
)
"""Okabe and Ito's colours without yellow, and a dark red; neighbours differ in brightness."""
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
    "singleset": (GREY, "h"),
    "three_messages": ("#E69F00", "X"),
}
"""Colour and marker of each method; readers who see few colours have the markers."""
_MARKERS = tuple(dict.fromkeys(marker for _, marker in _LOOKS.values()))
_DASHES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))
"""Line styles; a dotted line is a method that sends nothing, or a target."""
_LABEL_LETTERS = 36
"""Letters of a line in a legend; longer labels wrap."""


@contextmanager
def picture(path: Path, *shape: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Gives a figure and its axes, as from ``pyplot.subplots``; writes it as a PNG at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(*shape, layout="constrained", **options)
        try:
            yield figure, axes
            atomic_files.replace(path, lambda new: figure.savefig(new, dpi=150, format="png"))
        finally:
            pyplot.close(figure)


def styles(labels: Sequence[str]) -> list[Style]:
    """Returns a style for each label, so that no two lines look alike.

    An algorithm, the first word of a label, has its colour and marker, and its variants differ in
    their line style.  If a label names no algorithm, or an algorithm has too many variants, the
    lines have all colours in turn, with another line style each time.
    """
    names = [label.partition(",")[0] for label in labels]
    few = max((names.count(name) for name in names), default=0) <= len(_DASHES)
    if not few or not set(names) <= set(_LOOKS):
        return [_numbered(number) for number in range(len(labels))]
    variants = [names[:number].count(name) for number, name in enumerate(names)]
    return [_variant(name, variant) for name, variant in zip(names, variants, strict=True)]


def _numbered(number: int) -> Style:
    colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)]
    return {"color": colour, "linestyle": dash, "marker": _MARKERS[number % len(_MARKERS)]}


def _variant(name: str, variant: int) -> Style:
    colour, marker = _LOOKS[name]
    style = {"color": colour, "linestyle": _DASHES[variant], "marker": marker}
    return {**style, "markerfacecolor": "white"} if variant else style


def band(axes: Any, x: Sequence[float], seeds: Sequence[Sequence[float]], **style: Any) -> None:
    """Draws the mean of the seeds' curves and the band from the lowest to the highest values.

    Some eight points have a marker.
    """
    columns = list(zip(*seeds, strict=True))
    style = {"markevery": max(1, len(x) // 8), **style}
    [line] = axes.plot(x, [statistics.mean(column) for column in columns], **style)
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def legend_beside(figure: Any, axes: Any, title: str | None) -> None:
    """Puts the legend of ``axes`` to the right of all panels; the figure grows by its size."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [textwrap.fill(label, _LABEL_LETTERS) for label in labels]
    legend = figure.legend(handles, labels, loc="outside right upper", title=title)
    legend.set_alignment("left")
    box = legend.get_window_extent(figure.canvas.get_renderer())
    width, height = figure.get_size_inches()
    margin = 0.2  # inches
    height = max(height, box.height / figure.dpi + margin)
    figure.set_size_inches(width + box.width / figure.dpi, height)
