"""Parts that the tools' pictures share: files, curves with bands over seeds, and legends that fit.

Used by ``comparison_plots``, ``summarise`` and ``show_partition``.
"""

import statistics
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runtime import atomic_files

_LABEL_LETTERS = 50
"""Letters of a line in a legend; longer labels wrap."""
_LETTERS_PER_INCH = 10


@contextmanager
def picture(path: Path, *shape: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Gives a figure and its axes, as from ``pyplot.subplots``; writes it as a PNG at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*shape, layout="constrained", **options)
    try:
        yield figure, axes
        atomic_files.replace(path, lambda new: figure.savefig(new, dpi=150, format="png"))
    finally:
        pyplot.close(figure)


def band(axes: Any, x: Sequence[float], seeds: Sequence[Sequence[float]], **style: Any) -> None:
    """Draws the mean of the seeds' curves and the band from the lowest to the highest values."""
    columns = list(zip(*seeds, strict=True))
    [line] = axes.plot(x, [statistics.mean(column) for column in columns], **style)
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def legend_below(figure: Any, axes: Any, title: str | None) -> None:
    """Puts the legend of ``axes`` below all panels; the figure grows so that it is not cut off."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [textwrap.fill(label, _LABEL_LETTERS) for label in labels]
    widest = max(len(line) for label in labels for line in label.split("\n"))
    columns = int(figure.get_figwidth() * _LETTERS_PER_INCH) // (widest + 5)
    columns = max(1, min(len(labels), columns))
    place = "outside lower center"
    legend = figure.legend(handles, labels, loc=place, ncols=columns, title=title)
    box = legend.get_window_extent(figure.canvas.get_renderer())
    width, height = figure.get_size_inches()
    margin = 0.2  # inches
    width = max(width, box.width / figure.dpi + margin)
    figure.set_size_inches(width, height + box.height / figure.dpi)
