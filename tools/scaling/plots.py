"""Lines against the number of ranks, for the pictures of studies and predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedtan_hpc.reporting.comparison_plots import look_of

_LOOKS = {"three_messages": ("#E69F00", "X")}
"""Colour and marker of a method that is no algorithm of the package."""


def draw_methods(
    axes: Any, rows: Sequence[Mapping[str, Any]], column: str, labels: Mapping[str, str]
) -> None:
    """Draws a column of ``rows`` against ranks: a line for each method; efficiency in percent."""
    scale = 100 if column == "efficiency" else 1
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [(row["ranks"], scale * row[column]) for row in rows if row["method"] == method]
        colour, marker = _LOOKS[method] if method in _LOOKS else look_of(method)
        style = {"color": colour, "marker": marker, "markersize": 5}
        axes.plot(*zip(*points, strict=True), label=labels.get(method, method), **style)
    sizes = sorted({row["ranks"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("ranks")
    axes.grid(alpha=0.3)
