"""Latency and bandwidth of the sum over ranks, by size and carrier.

    mpirun -n 2 python tools/bench_allreduce.py backends=[mpi,gloo]
    torchrun --nproc-per-node 2 tools/bench_allreduce.py
    torchrun --nproc-per-node 1 tools/bench_allreduce.py device=cuda

backends=[...]  carriers (default: that of the launcher)
values=[...]    sizes of the messages, in float64 values (default [1,64,1024,16384,262144,1048576])
repeats=N       blocks of each size that count, carriers alternating (default 5)

All other words are options of the job (device, threads, comm.timeout_seconds).  A block is as many
sums as take some 50 ms.  Prints JSON, and a table on standard error.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench import benchmark

from fedtan_hpc.config.errors import ConfigError, format_option_error
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env

OWN = ("backends", "values", "repeats")
_USUAL = "values=[1,64,1024,16384,262144,1048576]"
_BLOCK_SECONDS = 0.05


def main() -> None:
    """Time all carriers and sizes, and print."""
    benchmark.command("bench_allreduce", __doc__, OWN, _time)


def _time(own: Mapping[str, str], job: list[str]) -> None:
    config = options.composed(job)
    check(config)
    values = options.values(own.get("values", _USUAL), "[64,1024]")
    if wrong := [size for size in values if not isinstance(size, int) or size < 1]:
        allowed = "whole numbers >= 1"
        raise ConfigError(
            format_option_error("values", wrong[0], allowed, "for example values=[64]")
        )
    repeats = benchmark.repeats(own, 5)
    results = measure(config, benchmark.backends(own), values, repeats)
    if launcher_env.rank_hint() == 0:
        show(results)
        setting = benchmark.setting(config, repeats=repeats)
        print(json.dumps({"setting": setting, "results": results}))


def measure(
    config: Config, backends: Sequence[str], sizes: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Microseconds of a sum of each size over each carrier, the slowest rank's."""
    found: dict[tuple[str, int], list[float]] = {}
    for carrier, counts in benchmark.turns(config, backends, repeats):
        for size in sizes:
            took = _block(size, carrier.device)
            if counts:
                found.setdefault((carrier.backend, size), []).append(took)
    return [_result(backend, size, times) for (backend, size), times in found.items()]


def _block(size: int, device: Any) -> float:
    """Seconds of one sum, from a block of several."""
    import torch

    message = torch.ones(size, dtype=torch.float64, device=device)
    _sums(message, 3)
    estimate = max(_sums(message, 3), 1e-6)
    return _sums(message, max(3, int(_BLOCK_SECONDS / estimate)))


def _sums(message: Any, number: int) -> float:
    """Seconds of one of ``number`` sums, the slowest rank's."""
    import torch

    from fedtan_hpc.distributed import collectives, process_group

    process_group.barrier()
    start = time.perf_counter()
    for _ in range(number):
        collectives.sum_over_ranks(message)
        message.fill_(1.0)
    if message.is_cuda:
        torch.cuda.synchronize()
    took = torch.tensor((time.perf_counter() - start) / number, dtype=torch.float64)
    return float(collectives.max_over_ranks(took.to(message.device)))


def _result(backend: str, size: int, times: list[float]) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "backend": backend,
        "bytes": 8 * size,
        "latency_us": 1e6 * median,
        "bandwidth_MB_s": 8 * size / median / 1e6,
        "all_us": [1e6 * t for t in times],
    }


def show(results: list[dict[str, Any]]) -> None:
    """The table."""
    rows = [["backend", "bytes", "us", "MB/s"], ["---"] * 4]
    for row in results:
        cells = [row["backend"], str(row["bytes"]), f"{row['latency_us']:.0f}"]
        rows.append([*cells, f"{row['bandwidth_MB_s']:.3g}"])
    print("\n".join(f"| {' | '.join(row)} |" for row in rows), file=sys.stderr)


if __name__ == "__main__":
    main()
