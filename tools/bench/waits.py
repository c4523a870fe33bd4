"""Extra time of a sum over ranks that follows computing, against a sum that follows a sum.

Used by fits of a network: ranks arrive at different times, and the backend has to wake up.
"""

import statistics
from collections.abc import Sequence

import torch

from bench import benchmark, sums, timing
from fedtan_hpc.config.schema import Config
from fedtan_hpc.distributed import process_group

COMPUTE_SECONDS = (3e-4, 3e-3, 3e-2, 3e-1)
"""Seconds of computing between sums: from a small layer to a round."""
_BLOCK_SECONDS = 0.3
_SUMS_IN_A_ROW = 50
_VALUES = 64
"""float64 values of a sum; the statistics of a layer have about as many."""

Pair = tuple[float, float]
"""Seconds computed before a sum, and extra seconds of that sum."""


def measure(config: Config, backends: Sequence[str], repeats: int) -> dict[str, list[Pair]]:
    """Returns pairs for each backend: medians over ``repeats`` blocks of means over the ranks.

    Every rank computes the same.  The extra seconds include waiting for ranks that are later.
    """
    benchmark.prepare_process(config)
    pairs: dict[tuple[str, float], list[Pair]] = {}
    for placement, counts in benchmark.alternate(config, backends, repeats):
        for target in COMPUTE_SECONDS:
            pair = _block(target, placement.device)
            if counts:
                pairs.setdefault((placement.backend, target), []).append(pair)
    return {
        backend: sorted(_median(blocks) for (name, _), blocks in pairs.items() if name == backend)
        for backend, _ in pairs
    }


def _median(pairs: Sequence[Pair]) -> Pair:
    computed, waited = zip(*pairs, strict=True)
    return statistics.median(computed), max(0.0, statistics.median(waited))


def _block(target: float, device: torch.device) -> Pair:
    """Measures a block of sums with about ``target`` seconds of computing before each."""
    inputs = torch.randn(8, 16, 16, 16, device=device)
    weights = torch.randn(16, 16, 3, 3, device=device)
    message = torch.ones(_VALUES, dtype=torch.float64, device=device)

    def compute(times: int) -> float:
        def run() -> None:
            for _ in range(times):
                torch.nn.functional.conv2d(inputs, weights, padding=1)

        return timing.seconds(run, device)

    def add(times: int) -> float:
        return timing.seconds(lambda: sums.add(message, times), device)

    compute(3)
    [of_ten] = timing.mean_over_ranks([compute(10)], device)
    convolutions = max(1, round(10 * target / of_ten))
    times = max(3, round(_BLOCK_SECONDS / target))
    [in_a_row] = timing.mean_over_ranks([add(_SUMS_IN_A_ROW)], device)
    process_group.barrier()
    computed = added = 0.0
    for _ in range(times):
        computed += compute(convolutions)
        added += add(1)
    means = timing.mean_over_ranks([computed / times, added / times], device)
    return means[0], means[1] - in_a_row / _SUMS_IN_A_ROW
