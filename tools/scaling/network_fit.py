"""Fits of the network model to sums over the ranks at hand; loads torch.

Used by fit_network, which writes the fit, and by validate_prediction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bench import benchmark, sums, waits
from fedtan_hpc.config.schema import Config
from scaling.network_model import Network, algorithm_for, steps

_SIZES = [4**power for power in range(3, 11)]
"""Message sizes in float64 values, from the statistics of a small layer to a model."""
_ALGORITHMS = {"gloo": ("exchange",), "nccl": ("tree", "ring")}
"""Algorithms of a backend, for small and for large messages."""


def algorithms_of(backend: str) -> tuple[str, ...]:
    """Returns the algorithms by which a backend sums, for small messages first."""
    return _ALGORITHMS.get(backend, ("doubling", "ring"))


def measure(
    config: Config, backends: Sequence[str], ranks: int, repeats: int
) -> tuple[list[dict[str, Any]], list[Network]]:
    """Returns timings of sums in a row, and a network for each backend; every rank calls it."""
    timings = sums.measure(config, backends, _SIZES, repeats)
    waits_of = waits.measure(config, backends, repeats) if ranks > 1 else {}
    machine = str(benchmark.setting(config)["machine"])
    networks = [
        replace(network, waits=tuple(waits_of[network.name]))
        for network in fit_all(timings, ranks, machine)
    ]
    return timings, networks


def fit_all(timings: Sequence[Mapping[str, Any]], ranks: int, machine: str) -> list[Network]:
    """Returns a network for each backend in ``timings``, the rows of ``sums.measure``."""
    if ranks == 1:
        return []
    networks = []
    for backend in dict.fromkeys(row["backend"] for row in timings):
        rows = [row for row in timings if row["backend"] == backend]
        seconds = [1e-6 * row["latency_us"] for row in rows]
        network = fit(backend, [row["bytes"] for row in rows], seconds, ranks)
        source = f"fitted to sums of {ranks} ranks on {machine}"
        networks.append(replace(network, source=source))
    return networks


def fit(backend: str, sizes: Sequence[int], seconds: Sequence[float], ranks: int) -> Network:
    """Fits alpha and beta to measured sums of ``sizes`` bytes over two or more ranks.

    A backend changes from its first algorithm to its second at some size.  The fit tries all sizes
    for that, and returns the model with the least squares of the relative errors.
    """
    algorithms = algorithms_of(backend)
    order = np.argsort(np.asarray(sizes))
    n = np.asarray(sizes, dtype=np.float64)[order]
    t = np.asarray(seconds, dtype=np.float64)[order]
    candidates = []
    for change in range(len(n) + 1) if len(algorithms) > 1 else [0]:
        used = [algorithms[0]] * change + [algorithms[-1]] * (len(n) - change)
        factors = []  # of alpha and beta, for each size
        for name, size in zip(used, n, strict=True):
            latencies, _, copies = steps(algorithm_for(name, size), ranks)
            factors.append((latencies, copies * size))
        alpha, beta = _least_squares(np.array(factors) / t[:, None])
        network = Network(name=backend, alpha_s=alpha, beta_s_per_byte=beta, algorithms=algorithms)
        model = np.array([network.all_reduce_seconds(size, ranks) for size in n])
        candidates.append((network, np.abs(model / t - 1)))
    network, errors = min(candidates, key=lambda candidate: float((candidate[1] ** 2).sum()))
    return replace(
        network,
        ranks_measured=ranks,
        median_error=float(np.median(errors)),
        worst_error=float(errors.max()),
    )


def _least_squares(relative: Any) -> tuple[float, float]:
    """Returns alpha and beta >= 0 for which all rows are nearest to 1."""
    ones, solutions = np.ones(len(relative)), []
    for columns in ([0, 1], [0], [1]):
        solution = np.zeros(2)
        solution[columns] = np.linalg.lstsq(relative[:, columns], ones, rcond=None)[0]
        solutions += [solution] if (solution >= 0).all() else []
    best = min(solutions, key=lambda solution: float(((relative @ solution - ones) ** 2).sum()))
    return float(best[0]), float(best[1])
