"""Clocks: seconds of a call on this rank, of the slowest rank, and means over ranks."""

import time
from collections.abc import Callable, Sequence

import torch

from fedtan_hpc.distributed import collectives, process_group


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of ``run`` on this rank, until ``device`` has finished its work."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def slowest_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of ``run`` on the slowest rank; all ranks start together."""
    process_group.barrier()
    value = torch.tensor(seconds(run, device), dtype=torch.float64, device=device)
    return float(collectives.max_over_ranks(value))


def mean_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Returns the mean over ranks of each value."""
    total = collectives.sum_over_ranks(torch.tensor(values, dtype=torch.float64, device=device))
    return [float(value) / process_group.world_size() for value in total]
