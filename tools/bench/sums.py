"""Sums over ranks, timed by size and backend: for bench_allreduce and for fits of a network."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import benchmark, timing
from fedtan_hpc.config.schema import Config
from fedtan_hpc.distributed import collectives

_BLOCK_SECONDS = 0.05


def measure(
    config: Config, backends: Sequence[str], sizes: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Returns a row for each backend and size (in float64 values), timed on the slowest rank."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for placement, counts in benchmark.alternate(config, backends, repeats):
        for size in sizes:
            of_one_sum = _block(size, placement.device)
            if counts:
                seconds.setdefault((placement.backend, size), []).append(of_one_sum)
    return [_row(backend, size, times) for (backend, size), times in seconds.items()]


def _block(size: int, device: torch.device) -> float:
    """Returns the mean seconds of a sum in a block that takes about ``_BLOCK_SECONDS``."""
    message = torch.ones(size, dtype=torch.float64, device=device)
    _mean_seconds(message, 3)
    estimate = max(_mean_seconds(message, 3), 1e-6)
    return _mean_seconds(message, max(3, int(_BLOCK_SECONDS / estimate)))


def _mean_seconds(message: Tensor, number: int) -> float:
    """Returns the slowest rank's mean seconds of ``number`` sums in a row."""
    return timing.slowest_seconds(lambda: add(message, number), message.device) / number


def add(message: Tensor, number: int) -> None:
    """Sums ``message`` over the ranks ``number`` times."""
    for _ in range(number):
        collectives.sum_over_ranks(message)
        message.fill_(1.0)


def _row(backend: str, size: int, times: list[float]) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "backend": backend,
        "bytes": 8 * size,
        "latency_us": 1e6 * median,
        "bandwidth_MB_s": 8 * size / median / 1e6,
        "all_us": [1e6 * t for t in times],
    }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints latency and bandwidth by backend and size."""
    columns = {"backend": "{backend}", "bytes": "{bytes}", "us": "{latency_us:.0f}"}
    benchmark.print_table(rows, {**columns, "MB/s": "{bandwidth_MB_s:.3g}"})
