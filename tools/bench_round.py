"""What a round costs: FedAvg and FedTAN against local compute and a plain loop, in one run.

    mpirun -n 2 python tools/bench_round.py backends=[mpi,gloo]
    torchrun --nproc-per-node 2 tools/bench_round.py compile=[false,true]
    torchrun --nproc-per-node 1 tools/bench_round.py device=cuda compile=[false,true]

backends=[...]  carriers of the collectives (default: that of the launcher)
compile=[...]   false, true or both (default [false])
repeats=N       rounds of each variant that count, alternating (default 9)

All other words are options of the job.  Every rank has one client with random samples of the data
set's shape.  Variants: plain (a loop of one's own: contiguous, torch's BN and SGD, no collectives),
convolutions (of the network, forward and backward, and nothing else), local (ours without
collectives), fedavg, fedtan; those without collectives also wait for the other ranks, so that a
round is the slowest rank's.  On GPUs, by a launcher, also ddp: torch's
SyncBatchNorm and DistributedDataParallel, which do in every step what fedtan does in its first:
compare them with local_steps=1.  Prints JSON, and a table on standard error.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench import benchmark, convolutions, rounds
from bench.benchmark import Carrier
from bench.data_parallel import DataParallelRound

from fedtan_hpc.config.enums import AlgorithmName
from fedtan_hpc.config.schema import AlgorithmConfig, Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env

OWN = ("backends", "compile", "repeats")
DEFAULTS = ["data=synthetic", "data.shape=[3,32,32]", "model=resnet20", "optimizer.momentum=0.9"]
_WARM = 3
"""Repeats that do not count where steps are compiled: to compile a variant is to forget those
before it, and CUDA graphs are recorded in a second run."""


@dataclass(frozen=True)
class Variant:
    """What is timed."""

    name: str
    """plain, convolutions, local, fedavg, fedtan or ddp."""
    backend: str
    compiled: bool
    round: Callable[[], object]
    begin: Callable[[], object] = lambda: None
    """What goes before in every process group, and is not timed."""


def main() -> None:
    """Time all variants and print."""
    benchmark.command("bench_round", __doc__, OWN, _time)


def _time(own: Mapping[str, str], job: list[str]) -> None:
    config = options.composed([*DEFAULTS, *job])
    compiling = options.values(own.get("compile", "compile=[false]"), "[false,true]")
    repeats = benchmark.repeats(own, 9)
    config.clients = launcher_env.detect().world_size
    check(config)
    results = measure(config, benchmark.backends(own), compiling, repeats)
    if launcher_env.rank_hint() == 0:
        show(results)
        print(json.dumps({"setting": setting(config, repeats), "results": results}))


def measure(
    config: Config, backends: Sequence[str], compiling: Sequence[bool], repeats: int
) -> list[dict[str, Any]]:
    """Seconds of a round of each variant in each repeat, and ratios to plain, local and FedAvg."""

    benchmark.settle(config)
    carriers = benchmark.carriers(config, backends)
    variants: list[Variant] = []
    seconds: list[list[float]] = []
    warm = _WARM if any(compiling) else 1
    for repeat in range(1 - warm, repeats + 1):
        for carrier in carriers:
            with carrier.started(config):
                if repeat == 1 - warm:
                    variants += _variants(config, carrier, compiling)
                    seconds += [[] for _ in range(len(variants) - len(seconds))]
                for variant, times in zip(variants, seconds, strict=True):
                    if variant.backend == carrier.backend:
                        variant.begin()
                        times.append(rounds.seconds(variant.round, carrier.device))
        benchmark.tell(max(repeat, 0), repeats)
    return list(_results(variants, [times[warm:] for times in seconds]))


def _variants(config: Config, carrier: Carrier, compiling: Sequence[bool]) -> Iterator[Variant]:
    backend, where = carrier.backend, carrier.device
    yield Variant("plain", backend, False, variant(config, "plain", False, where))
    if floor := convolutions.round_of(config, where):
        yield Variant("convolutions", backend, False, floor)
    for compiled in compiling:
        for name in ("local", "fedavg", "fedtan"):
            yield Variant(name, backend, compiled, variant(config, name, compiled, where))
    if where.type == "cuda" and launcher_env.detect().launcher != "none":
        parallel = DataParallelRound(config, where)
        yield Variant("ddp", backend, False, parallel, parallel.begin)


def variant(config: Config, name: str, compiled: bool, where: Any) -> Callable[[], object]:
    """A round of the loop ``name`` on the device ``where``."""
    if name == "plain":
        return _plain_round(config, where)
    options = replace(config, compile=compiled, algorithm=_algorithm(config, name))
    return rounds.one_client(options, where)


def _algorithm(config: Config, name: str) -> AlgorithmConfig:
    if name == "local":
        return AlgorithmConfig(name=AlgorithmName.singleset)
    if name == "fedavg":
        return AlgorithmConfig(name=AlgorithmName.fedavg)
    own = config.algorithm
    return own if own.name is AlgorithmName.fedtan else AlgorithmConfig()


def _plain_round(config: Config, where: Any) -> Callable[[], object]:
    """Of contiguous images, and torch's own BN."""
    from fedtan_hpc.models import factory

    facts = config.data.facts()
    model = factory.build(config.model, facts.shape, facts.classes, seed=0).to(where).train()
    return rounds.plain(config, model, rounds.samples(config, where))


def _results(variants: list[Variant], seconds: list[list[float]]) -> Iterator[dict[str, Any]]:
    """Medians, and medians of the ratios within a repeat."""
    of = {(v.name, v.backend, v.compiled): t for v, t in zip(variants, seconds, strict=True)}

    def ratio(times: list[float], name: str, backend: str, compiled: bool) -> float | None:
        others = of.get((name, backend, compiled), [])
        ratios = [a / b for a, b in zip(times, others, strict=False)]
        return statistics.median(ratios) if ratios else None

    for (name, backend, compiled), times in of.items():
        is_floor = name in ("plain", "convolutions")
        yield {
            "variant": name,
            "backend": backend,
            "compile": compiled,
            "round_ms": 1000 * statistics.median(times),
            "to_plain": ratio(times, "plain", backend, False),
            "to_local": None if is_floor else ratio(times, "local", backend, compiled),
            "to_fedavg": None if is_floor else ratio(times, "fedavg", backend, compiled),
            "all_ms": [1000 * t for t in times],
        }


def show(results: list[dict[str, Any]]) -> None:
    """The table."""
    heads = ["variant", "backend", "compile", "ms a round", "to plain", "to local", "to fedavg"]
    rows = [heads, ["---"] * len(heads)]
    for row in results:
        ratios = [row[name] for name in ("to_plain", "to_local", "to_fedavg")]
        cells = [row["variant"], row["backend"], str(row["compile"]).lower()]
        cells += [f"{row['round_ms']:.0f}", *("" if r is None else f"{r:.3f}" for r in ratios)]
        rows.append(cells)
    print("\n".join(f"| {' | '.join(row)} |" for row in rows), file=sys.stderr)


def setting(config: Config, repeats: int) -> dict[str, Any]:
    """What was run, on what."""
    return benchmark.setting(
        config,
        model=config.model.name,
        shape=list(config.data.facts().shape),
        batch_size=config.batch_size,
        local_steps=config.local_steps,
        precision=str(config.precision),
        channels_last=config.channels_last,
        repeats=repeats,
    )


if __name__ == "__main__":
    main()
