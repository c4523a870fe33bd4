"""Lines against the number of ranks, for the pictures of studies and predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedtan_hpc.reporting import pictures


def draw_methods(
    axes: Any, rows: Sequence[Mapping[str, Any]], column: str, labels: Mapping[str, str]
) -> None:
    """Draws a column of ``rows`` against ranks: a line for each method; efficiency in percent."""
    scale = 100 if column == "efficiency" else 1
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for method, style in zip(methods, pictures.styles(methods), strict=True):
        points = [(row["ranks"], scale * row[column]) for row in rows if row["method"] == method]
        axes.plot(*zip(*points, strict=True), label=labels.get(method, method), **style)
    sizes = sorted({row["ranks"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("ranks")
