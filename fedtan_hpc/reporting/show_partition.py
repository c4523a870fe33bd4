"""Who holds what: a picture and a short table of a partition's classes and sizes, client by client.

    python tools/show_partition.py out=partition.png partition=dirichlet clients=10
    python tools/show_partition.py experiment=fashion_shards

out=FILE       PNG to write (default partition.png)

All other words are options of the job, as for fedtan_hpc; it trains on this very partition.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import cli
from ..config.schema import Config, to_dict
from ..config.validate import check
from ..runtime import atomic_files, launcher_env
from . import options

Counts = npt.NDArray[np.int64]
"""Training samples by client and class, (clients, classes)."""

_SHOWN_CLIENTS = 20
"""Rows of the printed table."""
_NUMBERED = 16
"""Most clients and classes whose counts are written into the picture."""


def main(words: Sequence[str] | None = None) -> None:
    """Draw and print; exit codes as those of the job."""
    words = sys.argv[1:] if words is None else list(words)
    with cli.exit_codes("show_partition"):
        if launcher_env.rank_hint() != 0:
            return
        if {"--help", "-h"} & set(words):
            print(__doc__.strip())
            return
        own, job = options.split(words, ("out",))
        path = Path(options.folder(own.get("out", "out=partition.png")))
        config = options.composed(job)
        launcher_env.detect()
        check(config)
        options.check_plotting()
        options.check_writable(path)
        counts = count(config)
        print("\n".join(table(counts)))
        with options.written(path):
            draw(counts, title(config), path)
        print(f"picture: {path}")


def count(config: Config) -> Counts:
    """Load the labels and share them out as the job does."""
    from ..data import (
        datasets,
        partition,  # torch loads here
    )

    dataset = datasets.load(config.data, config.seed)
    labels = dataset.labels_N[dataset.train]
    parts = partition.split(labels, config.clients, config.partition, config.seed)
    return np.stack([np.bincount(labels[part], minlength=dataset.classes) for part in parts])


def title(config: Config) -> str:
    """The options that make the partition."""
    options = to_dict(config)["partition"]
    said = [f"{name}={value}" for name, value in options.items() if name != "name" and value]
    what = ", ".join([str(config.partition.name), *said])
    return f"{config.data.name}: {config.clients} clients, {what}, seed {config.seed}"


def table(counts: Counts) -> Iterator[str]:
    """Samples of each client and the classes that most of them have; the first clients only."""
    sizes = counts.sum(1)
    yield "client  samples  classes  most samples (class: number)"
    for client, row in enumerate(counts[:_SHOWN_CLIENTS]):
        top = [k for k in np.argsort(-row, kind="stable")[:4] if row[k]]
        most = ", ".join(f"{k}: {row[k]}" for k in top)
        yield f"{client:6d}  {sizes[client]:7d}  {np.count_nonzero(row):7d}  {most}"
    if len(counts) > _SHOWN_CLIENTS:
        yield f"   ...  and {len(counts) - _SHOWN_CLIENTS} more clients"
    yield (
        f"   all  {sizes.sum():7d}  {np.count_nonzero(counts.sum(0)):7d}  "
        f"a client has {sizes.min()} to {sizes.max()}, median {np.median(sizes):.0f}"
    )


def draw(counts: Counts, title: str, path: Path) -> None:
    """A field for each client and class, darker for more samples; each client's size beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    clients, classes = counts.shape
    height = min(12.0, max(2.8, 1.6 + 0.3 * clients))
    width = min(10.0, max(3.6, 0.42 * classes))
    figure, (field, bars) = pyplot.subplots(
        1,
        2,
        figsize=(width + 3.2, height),
        sharey=True,
        width_ratios=[width, 1.8],
        layout="constrained",
    )
    image = _field(field, counts)
    _sizes(bars, counts)
    bar = figure.colorbar(image, ax=bars, label="samples of the class", fraction=0.12, pad=0.08)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    atomic_files.replace(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    pyplot.close(figure)


def _field(axes: Any, counts: Counts) -> Any:
    """White is none at all; shades follow the root, so that small numbers tell apart too."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, PowerNorm

    blues = ListedColormap(colormaps["YlGnBu"](np.linspace(0.12, 1, 256)))
    norm = PowerNorm(0.5, vmin=0, vmax=counts.max())
    shown = np.ma.masked_equal(counts, 0)
    image = axes.imshow(shown, cmap=blues, norm=norm, aspect="auto", interpolation="nearest")
    if max(counts.shape) <= _NUMBERED:
        for (client, label), number in np.ndenumerate(counts):
            if number:
                colour = "white" if norm(number) > 0.55 else "black"
                axes.text(label, client, number, color=colour, ha="center", va="center", size=8)
    axes.set(xlabel="class (white: no samples)", ylabel="client")
    _ticks(axes.xaxis, counts.shape[1])
    _ticks(axes.yaxis, counts.shape[0])
    return image


def _sizes(axes: Any, counts: Counts) -> None:
    """Bars along the rows of the field."""
    sizes = counts.sum(1)
    axes.barh(
        np.arange(len(sizes)), sizes, color="#7F7F7F", height=0.8 if len(sizes) <= 40 else 1.0
    )
    axes.set(xlabel="samples", xlim=(0, 1.45 * sizes.max() if len(sizes) <= 40 else None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", nbins=2)
    axes.tick_params(axis="y", left=False, labelleft=False)
    if len(sizes) <= 40:
        for client, size in enumerate(sizes):
            axes.text(size, client, f" {size}", ha="left", va="center", size=8)


def _ticks(axis: Any, number: int) -> None:
    """Each row or column has its number, or every fifth, tenth or twentieth."""
    step = next(step for step in (1, 5, 10, 20, 50, number) if number / step <= 25)
    axis.set_ticks(range(0, number, step))


if __name__ == "__main__":
    main()
