"""Fit the cost model of sums over ranks to the machine at hand, for tools/predict_scaling.py.

    mpirun -n 2 python tools/fit_network.py out=network.json backends=[mpi,gloo]
    torchrun --nproc-per-node 4 tools/fit_network.py
    srun --nodes=2 --ntasks-per-node=1 python tools/fit_network.py

out=FILE        JSON to write (default network.json)
backends=[...]  carriers (default: that of the launcher)
repeats=N       blocks of each size that count, carriers alternating (default 5)

All other words are options of the job (device, threads, comm.timeout_seconds).  Times sums of 512
bytes to 8 MB as tools/bench_allreduce.py does, and finds each carrier's alpha (seconds of a step)
and beta (seconds of a byte) by least squares of the relative errors; tools/network_model.py has the
formulas.  Sums with computing between them then show what a sum waits for ranks that are late, and
for what carries it to wake.  A single rank sends nothing, and the file has no network.  Figures
hold for the links that were between these ranks: start one rank a node to fit what is between the
nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_allreduce
import numpy as np
from bench import benchmark, waits
from scaling import network_model
from scaling.network_model import Network, steps, taken

from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env

OWN = ("out", "backends", "repeats")
WAYS = {"gloo": ("exchange",), "nccl": ("tree", "ring")}
"""How a carrier sums; others double, or use a ring."""
_VALUES = [4**power for power in range(3, 11)]
"""Sizes, in float64 values, from a small layer's statistics to a model; with fewer values than
ranks some of these have nothing to send."""


def main() -> None:
    """Time, fit and write."""
    benchmark.command("fit_network", __doc__, OWN, _fit_and_write)


def _fit_and_write(own: Mapping[str, str], job: list[str]) -> None:
    config = options.composed(job)
    check(config)
    out = Path(options.folder(own.get("out", "out=network.json")))
    backends, repeats = benchmark.backends(own), benchmark.repeats(own, 5)
    ranks, first = launcher_env.detect().world_size, launcher_env.rank_hint() == 0
    if first:
        options.check_writable(out)
    timings, networks = measure(config, backends, ranks, repeats)
    if first:
        bench_allreduce.show(timings)
        write(out, config, networks, timings, repeats)


def measure(
    config: Config, backends: Sequence[str], ranks: int, repeats: int
) -> tuple[list[dict[str, Any]], list[Network]]:
    """Timings of sums in a row, and a network for each carrier; every rank calls it."""
    timings = bench_allreduce.measure(config, backends, _VALUES, repeats)
    waited = waits.measure(config, backends, repeats) if ranks > 1 else {}
    machine = str(benchmark.setting(config)["machine"])
    networks = [
        replace(network, waits=tuple(waited[network.name]))
        for network in fits(timings, ranks, machine)
    ]
    return timings, networks


def write(
    out: Path,
    config: Config,
    networks: Sequence[Network],
    timings: Sequence[Mapping[str, Any]],
    repeats: int,
) -> None:
    """The file, and what is in it on the terminal."""
    setting = benchmark.setting(config, repeats=repeats)
    with options.written(out):
        network_model.write(out, networks, setting=setting, timings=list(timings))
    for network in networks:
        print(told(network))
    print(f"file: {out}" if networks else f"file: {out}, without a network: one rank sends nothing")


def told(network: Network) -> str:
    """A line on a fit."""
    median, worst = network.median_error or 0.0, network.worst_error or 0.0
    return (
        f"{network.name}: alpha {1e6 * network.alpha_s:.3g} µs, "
        f"1 / beta {1e-6 / max(network.beta_s_per_byte, 1e-15):.4g} MB/s, "
        f"off by {100 * median:.0f} % (median) and {100 * worst:.0f} % (worst); waits"
        f"{', '.join(f' {1e3 * wait:.3g} ms after {1e3 * c:.3g} ms' for c, wait in network.waits)}"
    )


def fits(timings: Sequence[Mapping[str, Any]], ranks: int, machine: str) -> list[Network]:
    """A network for each carrier of ``timings``, as ``bench_allreduce.measure`` gives them."""
    if ranks == 1:
        return []
    found = []
    for name in dict.fromkeys(row["backend"] for row in timings):
        mine = [row for row in timings if row["backend"] == name]
        network = fit(
            name,
            [row["bytes"] for row in mine],
            [1e-6 * row["latency_us"] for row in mine],
            ranks,
        )
        source = f"fitted to sums of {ranks} ranks on {machine}"
        found.append(replace(network, source=source))
    return found


def fit(name: str, sizes: Sequence[int], seconds: Sequence[float], ranks: int) -> Network:
    """alpha and beta for measured sums of ``sizes`` bytes over two or more ranks.

    A carrier changes from its first way to its second at some size: all sizes are tried for that,
    and the model that is nearest to the measurements counts.
    """
    ways = WAYS.get(name, ("doubling", "ring"))
    order = np.argsort(np.asarray(sizes))
    n = np.asarray(sizes, dtype=np.float64)[order]
    t = np.asarray(seconds, dtype=np.float64)[order]
    candidates = []
    for change in range(len(n) + 1) if len(ways) > 1 else [0]:
        used = [ways[0]] * change + [ways[-1]] * (len(n) - change)
        rows = np.array([_row(way, size, ranks) for way, size in zip(used, n, strict=True)])
        alpha, beta = _least_squares(rows / t[:, None])
        candidates.append(Network(name=name, alpha_s=alpha, beta_s_per_byte=beta, algorithms=ways))
    errors = [_errors(network, n, t, ranks) for network in candidates]
    best = min(range(len(candidates)), key=lambda index: float((errors[index] ** 2).sum()))
    return replace(
        candidates[best],
        ranks_measured=ranks,
        median_error=float(np.median(errors[best])),
        worst_error=float(errors[best].max()),
    )


def _row(way: str, size: float, ranks: int) -> tuple[float, float]:
    """What alpha and beta are multiplied by."""
    outer, _, factor = steps(taken(way, size), ranks)
    return outer, factor * size


def _least_squares(relative: Any) -> tuple[float, float]:
    """alpha and beta, neither below 0, for which all rows come nearest to 1."""
    ones, found = np.ones(len(relative)), []
    for columns in ([0, 1], [0], [1]):
        both = np.zeros(2)
        both[columns] = np.linalg.lstsq(relative[:, columns], ones, rcond=None)[0]
        found += [both] if (both >= 0).all() else []
    best = min(found, key=lambda both: float(((relative @ both - ones) ** 2).sum()))
    return float(best[0]), float(best[1])


def _errors(network: Network, sizes: Any, seconds: Any, ranks: int) -> Any:
    """|model - measured| / measured, by size."""
    model = np.array([network.all_reduce_seconds(size, ranks) for size in sizes])
    return np.abs(model / seconds - 1)


if __name__ == "__main__":
    main()
