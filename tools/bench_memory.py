"""Peak memory of a round: FedAvg and FedTAN against a plain loop, each in a process of its own.

    python tools/bench_memory.py
    python tools/bench_memory.py model=cnn batch_size=256 compile=[false,true]

compile=[...]   false, true or both (default [false])
repeats=N       processes of each variant, alternating (default 3)

All other words are options of the job.  Variants as in tools/bench_round.py, for one client on one
rank.  Counted is what model, samples and rounds add to the process's peak, from when torch is
there; on a GPU, torch's own peak.  Prints JSON, and a table on standard error.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_round
from bench import benchmark

from fedtan_hpc.config.errors import RunError
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options

OWN = ("compile", "repeats", "only")
_ROUNDS = 3
_LOOPS = ("plain", "local", "fedavg", "fedtan")


def main() -> None:
    """Start a process for each variant, or be one of them (``only=...``)."""
    benchmark.command("bench_memory", __doc__, OWN, _measure_or_be_measured)


def _measure_or_be_measured(own: Mapping[str, str], job: list[str]) -> None:
    config = options.composed([*bench_round.DEFAULTS, "clients=1", *job])
    check(config)
    if "only" in own:
        print(added(config, *own["only"].partition("=")[2].split("-")))
        return
    compiling = options.values(own.get("compile", "compile=[false]"), "[false,true]")
    results = measure(job, compiling, benchmark.repeats(own, 3))
    show(results)
    print(json.dumps({"setting": benchmark.setting(config), "results": results}))


def measure(job: Sequence[str], compiling: Sequence[bool], repeats: int) -> list[dict[str, Any]]:
    """Megabytes of each variant, medians, and their ratio to plain."""
    names = ["plain-eager"]
    names += [f"{name}-{_how(compiled)}" for compiled in compiling for name in _LOOPS[1:]]
    found: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names:
            found[name].append(_in_a_process(name, job))
        benchmark.tell(repeat + 1, repeats)
    plain = statistics.median(found["plain-eager"])
    return [
        {
            "variant": name,
            "peak_MB": statistics.median(peaks),
            "to_plain": statistics.median(peaks) / plain,
            "all_MB": peaks,
        }
        for name, peaks in found.items()
    ]


def _how(compiled: bool) -> str:
    return "compiled" if compiled else "eager"


def _in_a_process(name: str, job: Sequence[str]) -> float:
    words = [sys.executable, __file__, *job, f"only={name}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{name}: {done.stderr.strip()}", on_all_ranks=True)
    return float(done.stdout.split()[-1])


def added(config: Config, loop: str, how: str) -> float:
    """Megabytes that some rounds of ``loop`` add to this process's peak."""
    import torch

    benchmark.settle(config, keeps_memory=loop != "plain")
    [carrier] = benchmark.carriers(config, ["auto"])
    if carrier.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _peak(carrier.device)
    run = bench_round.variant(config, loop, how == "compiled", carrier.device)
    for _ in range(_ROUNDS):
        run()
    return (_peak(carrier.device) - before) / 1e6


def _peak(where: Any) -> float:
    """Bytes."""
    import torch

    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    status = Path("/proc/self/status")
    if not status.exists():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])  # of this process, not of the one that it was forked from


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """The table."""
    rows = [["variant", "peak, MB", "to plain"], ["---"] * 3]
    for row in results:
        rows.append([row["variant"], f"{row['peak_MB']:.0f}", f"{row['to_plain']:.2f}"])
    print("\n".join(f"| {' | '.join(row)} |" for row in rows), file=sys.stderr)


if __name__ == "__main__":
    main()
