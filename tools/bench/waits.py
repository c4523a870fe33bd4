"""What a sum over ranks takes longer after computing than in a row of sums, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench import benchmark
from fedtan_hpc.config.schema import Config

COMPUTED = (3e-4, 3e-3, 3e-2, 3e-1)
"""Seconds of computing between sums: from a small layer to a round."""
_BLOCK_SECONDS = 0.3
_IN_A_ROW = 50
_VALUES = 64
"""float64 values of a sum, as of a layer's statistics."""


def measure(config: Config, backends: Sequence[str], repeats: int) -> dict[str, list[Any]]:
    """By carrier, pairs of seconds computed and seconds waited; every rank computes the same.

    Medians over ``repeats`` blocks of the mean time in a sum that follows computing, less that of
    one that follows a sum.  It has in it what a rank waits for those that are later.
    """

    benchmark.settle(config)
    found: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for carrier, counts in benchmark.turns(config, backends, repeats):
        for wanted in COMPUTED:
            pair = _pair(wanted, carrier.device)
            if counts:
                found.setdefault(carrier.backend, {}).setdefault(wanted, []).append(pair)
    return {name: sorted(_middle(pairs) for pairs in of.values()) for name, of in found.items()}


def _middle(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    computed, waited = zip(*pairs, strict=True)
    return statistics.median(computed), max(0.0, statistics.median(waited))


def _pair(wanted: float, where: Any) -> tuple[float, float]:
    """Seconds computed and waited for about ``wanted`` seconds of computing."""
    import torch

    from fedtan_hpc.distributed import collectives, process_group

    inputs = torch.randn(8, 16, 16, 16, device=where)
    weights = torch.randn(16, 16, 3, 3, device=where)
    message = torch.ones(_VALUES, dtype=torch.float64, device=where)

    def compute(units: int) -> None:
        for _ in range(units):
            torch.nn.functional.conv2d(inputs, weights, padding=1)
        _finish(where)

    def add(times: int) -> None:
        for _ in range(times):
            collectives.sum_over_ranks(message)
            message.fill_(1.0)
        _finish(where)

    compute(3)
    units = max(1, round(10 * wanted / _mean_over_ranks(_seconds(lambda: compute(10)), where)))
    times = max(3, round(_BLOCK_SECONDS / wanted))
    in_a_row = _mean_over_ranks(_seconds(lambda: add(_IN_A_ROW)), where)
    computed = added = 0.0
    process_group.barrier()
    for _ in range(times):
        computed += _seconds(lambda: compute(units))
        added += _seconds(lambda: add(1))
    of_one = _mean_over_ranks(added / times, where)
    return _mean_over_ranks(computed / times, where), of_one - in_a_row / _IN_A_ROW


def _finish(where: Any) -> None:
    import torch

    if where.type == "cuda":
        torch.cuda.synchronize()


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _mean_over_ranks(value: float, where: Any) -> float:
    import torch

    from fedtan_hpc.distributed import collectives, process_group

    total = collectives.sum_over_ranks(torch.tensor(value, dtype=torch.float64, device=where))
    return float(total) / process_group.world_size()
