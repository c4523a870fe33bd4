"""Time of a round: FedAvg and FedTAN against local training and a plain loop, in one run.

    mpirun -n 2 python tools/bench_round.py backends=[mpi,gloo]
    torchrun --nproc-per-node 2 tools/bench_round.py compile=[false,true]
    torchrun --nproc-per-node 1 tools/bench_round.py device=cuda compile=[false,true]

backends=[...]  backends of torch.distributed (default: the launcher's)
compile=[...]   false, true or both (default [false])
shared=[...]    ranks of a client, such as [2,4], in more variants of both (default none)
repeats=N       counted rounds of each variant, alternating (default 9)

All other words are options of the job.  Every rank has one client with random samples of the data
set's shape.  Variants:

    plain         a loop as a user writes it: contiguous images, torch's BN and SGD, no collectives
    convolutions  the network's convolutions, forward and backward, and nothing else
    local         this package without collectives
    alone         the same on rank 0 while the others wait; only with shared
    fedavg        this package
    fedtan        this package
    overlapped    fedavg that sums a client's gradients during the backward pass, as the job does;
                  only with shared, where fedavg sums them after it
    ddp           torch's SyncBatchNorm and DistributedDataParallel, on GPUs with a launcher: every
                  step does what FedTAN does in its first; compare them with local_steps=1

A time is the slowest rank's, also for variants without collectives.  Prints JSON, and a table on
standard error.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench import benchmark
from fedtan_hpc.config.errors import ConfigError, format_option_error
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env

if TYPE_CHECKING:
    from fedtan_hpc.runtime.device import DevicePlacement

OPTIONS = ("backends", "compile", "shared", "repeats")
_COMPILE_WARMUPS = 3
"""Warm-up repeats with compiled steps: compiling a variant drops the compiled code of those before
it, and CUDA graphs are recorded in a second run."""


@dataclass(frozen=True)
class Variant:
    """A kind of round on one backend."""

    name: str
    """plain, convolutions, local, fedavg, fedtan or ddp."""
    backend: str
    compiled: bool
    run: Callable[[], object]
    begin: Callable[[], object] = lambda: None
    """Called in each new process group before ``run``; not timed."""


def run(words: Sequence[str]) -> None:
    """Times all variants, and prints."""
    tool_options, job_words = options.split(words, OPTIONS)
    config = options.composed(benchmark.with_defaults(benchmark.DEFAULTS, job_words))
    compiling = benchmark.compiling(tool_options)
    repeats = benchmark.repeats(tool_options, 9)
    config.clients = ranks = launcher_env.detect().world_size
    check(config)
    shared = (
        benchmark.whole_numbers(tool_options["shared"], "[2,4]") if "shared" in tool_options else []
    )
    if wrong := [size for size in shared if ranks % size]:
        allowed, remedy = f"divisors of the number of ranks, {ranks}", "start more ranks"
        raise ConfigError(format_option_error("shared", wrong[0], allowed, remedy))
    results = measure(config, benchmark.backends(tool_options), compiling, repeats, shared)
    if launcher_env.rank_hint() == 0:
        _print_table(results)
        benchmark.print_json(_setting(config, repeats), results)


def measure(
    config: Config,
    backends: Sequence[str],
    compiling: Sequence[bool],
    repeats: int,
    shared: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Returns a row for each variant: its times, and their ratios to other variants."""
    from bench import timing  # torch loads here

    benchmark.prepare_process(config)
    placements = benchmark.placements(config, backends)
    built: list[Variant] = []
    seconds: list[list[float]] = []
    warmups = _COMPILE_WARMUPS if any(compiling) else 1
    for repeat in range(1 - warmups, repeats + 1):
        for placement in placements:
            with benchmark.process_group(config, placement):
                if repeat == 1 - warmups:
                    built += _variants(config, placement, compiling)
                    built += _shared_variants(config, placement, shared)
                    seconds += [[] for _ in range(len(built) - len(seconds))]
                for variant, times in zip(built, seconds, strict=True):
                    if variant.backend == placement.backend:
                        variant.begin()
                        times.append(timing.slowest_seconds(variant.run, placement.device))
        benchmark.show_progress(max(repeat, 0), repeats)
    return list(_rows(built, [times[warmups:] for times in seconds]))


def _variants(
    config: Config, placement: DevicePlacement, compiling: Sequence[bool]
) -> Iterator[Variant]:
    from bench import convolutions, rounds

    backend, device = placement.backend, placement.device
    yield Variant("plain", backend, False, rounds.build(config, "plain", False, device))
    if run := convolutions.round_of(config, device):
        yield Variant("convolutions", backend, False, run)
    for compiled in compiling:
        for name in ("local", "fedavg", "fedtan"):
            yield Variant(name, backend, compiled, rounds.build(config, name, compiled, device))
    if device.type == "cuda" and launcher_env.detect().launcher != "none":
        parallel = rounds.DataParallelRound(config, device)
        yield Variant("ddp", backend, False, parallel, parallel.begin)


def _shared_variants(
    config: Config, placement: DevicePlacement, shared: Sequence[int]
) -> Iterator[Variant]:
    from bench import rounds

    backend, device = placement.backend, placement.device
    if shared:
        alone = rounds.on_rank_0(rounds.build(config, "local", False, device))
        yield Variant("alone", backend, False, alone)
    for size in shared:
        for name in ("fedavg", "fedtan", "overlapped"):
            run = rounds.SharedClientRound(config, name, size, device)
            yield Variant(f"{name}, {size} ranks a client", backend, False, run, run.begin)


def _rows(variants: Sequence[Variant], seconds: list[list[float]]) -> Iterator[dict[str, Any]]:
    keys = [(variant.name, variant.backend, variant.compiled) for variant in variants]
    times_of = dict(zip(keys, seconds, strict=True))

    def ratio(times: list[float], name: str, backend: str, compiled: bool) -> float | None:
        others = times_of.get((name, backend, compiled), [])
        ratios = [a / b for a, b in zip(times, others, strict=False)]
        return statistics.median(ratios) if ratios else None

    for (name, backend, compiled), times in times_of.items():
        is_lower_bound = name in ("plain", "convolutions")
        yield {
            "variant": name,
            "backend": backend,
            "compile": compiled,
            "round_ms": 1000 * statistics.median(times),
            "to_plain": ratio(times, "plain", backend, False),
            "to_local": None if is_lower_bound else ratio(times, "local", backend, compiled),
            "to_alone": None if is_lower_bound else ratio(times, "alone", backend, False),
            "to_fedavg": None if is_lower_bound else ratio(times, "fedavg", backend, compiled),
            "all_ms": [1000 * t for t in times],
        }


def _print_table(results: Sequence[Mapping[str, Any]]) -> None:
    columns = {"variant": "{variant}", "backend": "{backend}", "compile": "{compile}"}
    columns |= {"ms a round": "{round_ms:.0f}"}
    rows = [dict(row) for row in results]
    for row in rows:
        row["compile"] = str(row["compile"]).lower()
        for name in ("to_plain", "to_local", "to_alone", "to_fedavg"):
            row[name] = "" if row[name] is None else f"{row[name]:.3f}"
            columns[name.replace("_", " ")] = f"{{{name}}}"
    benchmark.print_table(rows, columns)


def _setting(config: Config, repeats: int) -> dict[str, Any]:
    return benchmark.setting(
        config,
        model=config.model.name,
        shape=list(config.data.info().shape),
        batch_size=config.batch_size,
        local_steps=config.local_steps,
        precision=str(config.precision),
        channels_last=config.channels_last,
        repeats=repeats,
    )


if __name__ == "__main__":
    benchmark.main("bench_round", __doc__, run)
