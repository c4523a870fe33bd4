"""Peak memory of a round: FedAvg and FedTAN against a plain loop, each in its own process.

    python tools/bench_memory.py
    python tools/bench_memory.py model=cnn batch_size=256 compile=[false,true]

compile=[...]   false, true or both (default [false])
repeats=N       processes of each variant, alternating (default 3)

All other words are options of the job.  The variants are plain, local, fedavg and fedtan of
tools/bench_round.py, for one client on one rank.  A figure is what model, samples and rounds add to
the process's peak after torch has been loaded; on a GPU it is torch's own peak.  Prints JSON, and a
table on standard error.
"""

import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import benchmark
from fedtan_hpc.config.errors import RunError
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options

OPTIONS = ("compile", "repeats", "only")
_ROUNDS = 3
_TRAINING = ("local", "fedavg", "fedtan")


def run(words: Sequence[str]) -> None:
    """Starts a process for each variant, or is one of them (``only=NAME-eager``)."""
    tool_options, job_words = options.split(words, OPTIONS)
    words_of_job = benchmark.with_defaults(benchmark.DEFAULTS, job_words)
    config = options.composed(["clients=1", *words_of_job])
    check(config)
    if "only" in tool_options:
        print(added_megabytes(config, *tool_options["only"].partition("=")[2].split("-")))
        return
    compiling = benchmark.compiling(tool_options)
    results = measure(job_words, compiling, benchmark.repeats(tool_options, 3))
    columns = {"variant": "{variant}", "peak, MB": "{peak_MB:.0f}", "to plain": "{to_plain:.2f}"}
    benchmark.print_table(results, columns)
    benchmark.print_json(benchmark.setting(config), results)


def measure(
    job_words: Sequence[str], compiling: Sequence[bool], repeats: int
) -> list[dict[str, Any]]:
    """Returns a row for each variant: its median peak, and the ratio to plain."""
    names = ["plain-eager"]
    for compiled in compiling:
        names += [f"{name}-{'compiled' if compiled else 'eager'}" for name in _TRAINING]
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names:
            peaks[name].append(_in_a_process(name, job_words))
        benchmark.show_progress(repeat + 1, repeats)
    medians = {name: statistics.median(values) for name, values in peaks.items()}
    plain = medians["plain-eager"]
    return [
        {"variant": name, "peak_MB": median, "to_plain": median / plain, "all_MB": peaks[name]}
        for name, median in medians.items()
    ]


def _in_a_process(name: str, job_words: Sequence[str]) -> float:
    command = [sys.executable, __file__, *job_words, f"only={name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{name}: {done.stderr.strip()}", on_all_ranks=True)
    return float(done.stdout.split()[-1])


def added_megabytes(config: Config, name: str, mode: str) -> float:
    """Returns what some rounds of a variant add to this process's peak, in MB."""
    import torch

    from bench import rounds

    benchmark.prepare_process(config, keeps_memory=name != "plain")
    [placement] = benchmark.placements(config, ["auto"])
    if placement.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _peak_bytes(placement.device)
    run = rounds.build(config, name, mode == "compiled", placement.device)
    for _ in range(_ROUNDS):
        run()
    return (_peak_bytes(placement.device) - before) / 1e6


def _peak_bytes(device: Any) -> float:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss would include the peak of the process that this one was forked from.
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    benchmark.main("bench_memory", __doc__, run)
