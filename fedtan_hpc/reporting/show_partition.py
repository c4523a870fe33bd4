"""Shows which client has which samples: a picture and a table of classes and sizes by client.

    python -m fedtan_hpc.show_partition out=partition.png partition=dirichlet clients=10
    python -m fedtan_hpc.show_partition experiment=fashion_shards

out=FILE       PNG to write (default partition.png)

All other words are options of the job, as for fedtan_hpc; the job trains on the same partition.  In
a checkout ``python tools/show_partition.py`` does the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import cli
from ..config.schema import Config, to_dict
from ..config.validate import check
from ..runtime import launcher_env
from . import options
from .pictures import GREY, picture

if TYPE_CHECKING:  # numpy loads after the options are checked
    import numpy as np
    import numpy.typing as npt

Counts: TypeAlias = "npt.NDArray[np.int64]"
"""Training samples by client and class, (clients, classes)."""
_PRINTED_CLIENTS = 20
"""Rows of the printed table."""
_MOST_NUMBERS = 16
"""Most clients and most classes with which the picture shows the counts as numbers too."""
_MOST_SIZES = 40
"""Most clients with which the picture shows each client's size as a number too."""


def main(words: Sequence[str] | None = None) -> None:
    """Draws and prints; the exit codes are those of the job."""
    words = sys.argv[1:] if words is None else list(words)
    with cli.exit_codes("show_partition"):
        if launcher_env.rank_hint() != 0 or options.shows_help(words, __doc__):
            return
        tool_options, job = options.split(words, ("out",))
        path = Path(options.folder(tool_options.get("out", "out=partition.png")))
        config = options.composed(job)
        launcher_env.detect()
        check(config)
        options.check_plotting()
        options.check_writable(path)
        config, counts = count(config)
        print("\n".join([title(config), *table(counts)]))
        with options.written(path):
            draw(counts, path)
        print(f"picture: {path}")


def count(config: Config) -> tuple[Config, Counts]:
    """Loads the labels, with a download if need be, and shares them out as the job does.

    Returns the options with the number of clients that the user's data have.
    """
    import numpy as np

    from ..data import datasets, download  # loads torch
    from ..job import setup

    download.fetch(config.data)
    if config.data.is_own:
        config, dataset = setup.load_own(config)
    else:
        dataset = datasets.load(config.data, config.seed)
    parts = datasets.partition_of(dataset, config)
    labels, classes = dataset.labels_N, dataset.classes
    return config, np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def title(config: Config) -> str:
    """Returns the options that make the partition."""
    chosen = to_dict(config)["partition"]
    words = [f"{name}={value}" for name, value in chosen.items() if name != "name" and value]
    name = ", ".join([str(config.partition.name), *words])
    return f"{config.data.name}: {config.clients} clients, {name}, seed {config.seed}"


def table(counts: Counts) -> Iterator[str]:
    """Yields a line for each of the first clients: its samples and its largest classes."""
    import numpy as np

    sizes = counts.sum(1)
    yield "client  samples  classes  most samples (class: number)"
    for client, row in enumerate(counts[:_PRINTED_CLIENTS]):
        largest = [k for k in np.argsort(-row, kind="stable")[:4] if row[k]]
        most = ", ".join(f"{k}: {row[k]}" for k in largest)
        yield f"{client:6d}  {sizes[client]:7d}  {np.count_nonzero(row):7d}  {most}"
    if len(counts) > _PRINTED_CLIENTS:
        yield f"   ...  and {len(counts) - _PRINTED_CLIENTS} more clients"
    yield (
        f"   all  {sizes.sum():7d}  {np.count_nonzero(counts.sum(0)):7d}  "
        f"a client has {sizes.min()} to {sizes.max()}, median {np.median(sizes):.0f}"
    )


def draw(counts: Counts, path: Path) -> None:
    """Draws a field for each client and class, darker for more samples, and the clients' sizes."""
    from matplotlib.ticker import MaxNLocator

    clients, classes = counts.shape
    height = min(12.0, max(2.8, 1.6 + 0.3 * clients))
    width = min(10.0, max(3.6, 0.42 * classes))
    shape = {"figsize": (width + 3.2, height), "sharey": True, "width_ratios": [width, 1.8]}
    with picture(path, 1, 2, **shape) as (figure, (field, bars)):
        image = _draw_field(field, counts)
        _draw_sizes(bars, counts)
        label = "samples of the class"
        colours = figure.colorbar(image, ax=bars, label=label, fraction=0.12, pad=0.08)
        colours.ax.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_field(axes: Any, counts: Counts) -> Any:
    """Leaves fields without samples white; shades follow the root, which separates small counts."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, PowerNorm

    blues = ListedColormap(colormaps["YlGnBu"](np.linspace(0.12, 1, 256)))
    norm = PowerNorm(0.5, vmin=0, vmax=counts.max())
    nonzero = np.ma.masked_equal(counts, 0)
    image = axes.imshow(nonzero, cmap=blues, norm=norm, aspect="auto", interpolation="nearest")
    if max(counts.shape) <= _MOST_NUMBERS:
        for (client, label), number in np.ndenumerate(counts):
            if number:
                colour = "white" if norm(number) > 0.55 else "black"
                axes.text(label, client, number, color=colour, ha="center", va="center", size=8)
    axes.set(xlabel="class (white: no samples)", ylabel="client")
    axes.grid(False)
    _set_ticks(axes.xaxis, counts.shape[1])
    _set_ticks(axes.yaxis, counts.shape[0])
    return image


def _draw_sizes(axes: Any, counts: Counts) -> None:
    sizes = counts.sum(1)
    few = len(sizes) <= _MOST_SIZES
    axes.barh(range(len(sizes)), sizes, color=GREY, height=0.8 if few else 1.0)
    axes.set(xlabel="samples", xlim=(0, 1.45 * sizes.max() if few else None))
    axes.grid(False, axis="y")
    axes.locator_params(axis="x", nbins=2)
    axes.tick_params(axis="y", left=False, labelleft=False)
    for client, size in enumerate(sizes if few else []):
        axes.text(size, client, f" {size}", ha="left", va="center", size=8)


def _set_ticks(axis: Any, number: int) -> None:
    """Numbers each row or column, or every fifth, tenth, twentieth or fiftieth of many."""
    step = next(step for step in (1, 5, 10, 20, 50, number) if number / step <= 25)
    axis.set_ticks(range(0, number, step))
