"""Latency and bandwidth of the sum over ranks, by message size and backend.

    mpirun -n 2 python tools/bench_allreduce.py backends=[mpi,gloo]
    torchrun --nproc-per-node 2 tools/bench_allreduce.py
    torchrun --nproc-per-node 1 tools/bench_allreduce.py device=cuda

backends=[...]  backends of torch.distributed (default: the launcher's)
values=[...]    message sizes in float64 values (default [1,64,1024,16384,262144,1048576])
repeats=N       counted blocks of each size, backends alternating (default 5)

All other words are options of the job (device, threads, comm.timeout_seconds).  A block has as many
sums as fit in about 50 ms.  Prints JSON, and a table on standard error.
"""

from collections.abc import Sequence

from bench import benchmark
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env

OPTIONS = ("backends", "values", "repeats")
_SIZES = "values=[1,64,1024,16384,262144,1048576]"


def run(words: Sequence[str]) -> None:
    """Times all backends and sizes, and prints."""
    tool_options, job_words = options.split(words, OPTIONS)
    config = options.composed(job_words)
    check(config)
    sizes = benchmark.whole_numbers(tool_options.get("values", _SIZES), "[64,1024]", 10**9)
    repeats = benchmark.repeats(tool_options, 5)
    backends = benchmark.backends(tool_options)
    from bench import sums  # torch loads here

    results = sums.measure(config, backends, sizes, repeats)
    if launcher_env.rank_hint() == 0:
        sums.print_table(results)
        benchmark.print_json(benchmark.setting(config, repeats=repeats), results)


if __name__ == "__main__":
    benchmark.main("bench_allreduce", __doc__, run)
