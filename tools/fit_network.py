"""Fit the cost model of sums over ranks to this machine, for tools/predict_scaling.py.

    mpirun -n 2 python tools/fit_network.py out=network.json backends=[mpi,gloo]
    torchrun --nproc-per-node 4 tools/fit_network.py
    srun --nodes=2 --ntasks-per-node=1 python tools/fit_network.py

out=FILE        JSON file to write (default network.json)
backends=[...]  backends of torch.distributed (default: the launcher's)
repeats=N       counted blocks of each size, backends alternating (default 5)

All other words are options of the job (device, threads, comm.timeout_seconds).  Times sums of 512
bytes to 8 MB as tools/bench_allreduce.py does, and fits alpha (seconds of a step) and beta (seconds
of a byte) of each backend by least squares of the relative errors; the formulas stand in
tools/scaling/network_model.py.  Then it times sums that follow computing, which wait for late ranks
and for the backend to wake up.  One rank sends nothing, and its file has no network.  The figures
hold for the links between these ranks: start one rank a node to fit the links between nodes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import benchmark
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env
from scaling import network_model
from scaling.network_model import Network

OPTIONS = ("out", "backends", "repeats")


def run(words: Sequence[str]) -> None:
    """Times, fits and writes."""
    tool_options, job_words = options.split(words, OPTIONS)
    config = options.composed(job_words)
    check(config)
    out = Path(options.folder(tool_options.get("out", "out=network.json")))
    backends, repeats = benchmark.backends(tool_options), benchmark.repeats(tool_options, 5)
    ranks, is_first = launcher_env.detect().world_size, launcher_env.rank_hint() == 0
    if is_first:
        options.check_writable(out)
    from bench import sums  # torch loads here
    from scaling import network_fit

    timings, networks = network_fit.measure(config, backends, ranks, repeats)
    if is_first:
        sums.print_table(timings)
        setting = benchmark.setting(config, repeats=repeats)
        _write(out, networks, {"setting": setting, "timings": list(timings)})


def _write(out: Path, networks: Sequence[Network], more: Mapping[str, Any]) -> None:
    with options.written(out):
        network_model.write(out, networks, **more)
    for network in networks:
        print(_line_on(network))
    print(f"file: {out}" if networks else f"file: {out}, without a network: one rank sends nothing")


def _line_on(network: Network) -> str:
    median, worst = network.median_error or 0.0, network.worst_error or 0.0
    waits = [f" {1e3 * wait:.3g} ms after {1e3 * c:.3g} ms" for c, wait in network.waits]
    return (
        f"{network.name}: alpha {1e6 * network.alpha_s:.3g} µs, "
        f"1 / beta {1e-6 / max(network.beta_s_per_byte, 1e-15):.4g} MB/s, "
        f"off by {100 * median:.0f} % (median) and {100 * worst:.0f} % (worst); "
        f"waits{','.join(waits)}"
    )


if __name__ == "__main__":
    benchmark.main("fit_network", __doc__, run)
