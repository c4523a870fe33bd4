"""How far predicted rounds are from measured ones, on the ranks at hand.

    mpirun -n 2 python tools/validate_prediction.py backends=[mpi,gloo] models=[mlp,cnn,resnet20]
    torchrun --nproc-per-node 4 tools/validate_prediction.py

backends=[...]  carriers (default: that of the launcher)
models=[...]    networks (default [mlp,cnn,resnet20])
repeats=N       rounds of each kind that count, alternating (default 9)

All other words are options of the job.  Every rank has one client with random samples.  First the
network is fitted as by tools/fit_network.py, with 5 repeats at most; then rounds of every rank by
itself, all at the same time, tell what steps take.  They alternate with fedtan, fedavg and
centralised rounds, which are what is predicted.  Prints JSON, and a table on standard error.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import fit_network
from bench import benchmark, rounds
from bench.benchmark import Carrier
from scaling.network_model import Network
from scaling.round_model import Method, terms

from fedtan_hpc.config.enums import AlgorithmName
from fedtan_hpc.config.errors import ConfigError, format_option_error
from fedtan_hpc.config.schema import AlgorithmConfig, Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env
from scaling import job_costs

OWN = ("backends", "models", "repeats")
_DEFAULTS = ["data=synthetic", "data.shape=[3,32,32]"]
_FITTED = 5
"""Repeats that a fit needs at most."""
_METHODS = ("fedtan", "fedavg", "centralised")
Times = dict[tuple[str, str], list[float]]
"""Seconds of rounds by carrier and kind; those of a rank by itself have the carrier ""."""


def main() -> None:
    """Fit, time, compare and print."""
    benchmark.command("validate_prediction", __doc__, OWN, _compare)


def _compare(own: Mapping[str, str], job: list[str]) -> None:
    backends, repeats = benchmark.backends(own), benchmark.repeats(own, 9)
    jobs = configs(own.get("models", "models=[mlp,cnn,resnet20]"), job)
    results = validate(jobs, backends, repeats)
    if launcher_env.rank_hint() == 0:
        show(results)
        print(json.dumps({"setting": setting(jobs[0], repeats), "results": results}))


def configs(word: str, job: Sequence[str]) -> list[Config]:
    """A job for each network; raises ``ConfigError``."""
    for each in job:
        option, _, value = each.lstrip("+").partition("=")
        if option in ("model", "clients") or option.partition(".")[0] == "algorithm":
            remedy = "leave it out; models=[...] names networks"
            raise ConfigError(
                format_option_error(option, value, "no value (this tool sets it)", remedy)
            )
    ranks, found = launcher_env.detect().world_size, []
    for name in options.values(word, "[mlp,cnn]"):
        config = options.composed([*_DEFAULTS, *job, f"model={name}", f"clients={ranks}"])
        check(config)
        found.append(config)
    return found


def validate(jobs: Sequence[Config], backends: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """A row for each network, carrier and method; every rank calls it."""
    ranks = launcher_env.detect().world_size
    _, fitted = fit_network.measure(jobs[0], backends, ranks, min(repeats, _FITTED))
    networks = {network.name: network for network in fitted}
    found: list[dict[str, Any]] = []
    for config in jobs:
        measured = _times(config, benchmark.carriers(config, backends), repeats)
        found += _compared(config, networks, measured, ranks)
    return found


def _times(config: Config, carriers: Sequence[Carrier], repeats: int) -> Times:

    benchmark.settle(config)
    where = carriers[0].device
    by_itself = job_costs.alone(config, where)
    together = _together(config, where)
    found: Times = {}
    for repeat in range(repeats + 1):  # the first warms up
        taken = {("", str(kind)): rounds.seconds(run, where) for kind, run in enumerate(by_itself)}
        for carrier in carriers:
            with carrier.started(config):
                for name, run in together.items():
                    taken[carrier.backend, name] = rounds.seconds(run, where)
        if repeat:
            for key, seconds in taken.items():
                found.setdefault(key, []).append(seconds)
        benchmark.tell(repeat, repeats)
    with carriers[0].started(config):
        return {key: _mean_over_ranks(times, where) for key, times in found.items()}


def _together(config: Config, where: Any) -> dict[str, Callable[[], object]]:
    """Rounds of all ranks."""
    algorithms = {name: AlgorithmConfig(name=AlgorithmName(name)) for name in _METHODS}
    return {
        name: rounds.one_client(replace(config, algorithm=algorithm), where)
        for name, algorithm in algorithms.items()
    }


def _mean_over_ranks(times: Sequence[float], where: Any) -> list[float]:
    """Those of a rank by itself are its own; the others' are the slowest rank's already."""
    import torch

    from fedtan_hpc.distributed import collectives, process_group

    total = collectives.sum_over_ranks(torch.tensor(times, dtype=torch.float64, device=where))
    return [float(value) / process_group.world_size() for value in total]


def _compared(
    config: Config, networks: Mapping[str, Network], measured: Times, ranks: int
) -> Iterator[dict[str, Any]]:
    by_itself = [statistics.median(times) for (name, _), times in measured.items() if not name]
    load = job_costs.load(config, by_itself)
    methods = _methods(config, ranks)
    for (backend, name), times in measured.items():
        if backend:
            network = networks.get(backend, Network(name=backend, alpha_s=0, beta_s_per_byte=0))
            predicted = terms(methods[name], load, network, ranks)
            seconds = statistics.median(times)
            yield {
                "model": str(config.model.name),
                "backend": backend,
                "method": name,
                "predicted_ms": 1000 * predicted.seconds,
                "measured_ms": 1000 * seconds,
                "error": predicted.seconds / seconds - 1,
                "terms_ms": {term: 1000 * value for term, value in asdict(predicted).items()},
                "all_ms": [1000 * value for value in times],
            }


def _methods(config: Config, ranks: int) -> dict[str, Method]:
    """Their messages but for the clients' losses, which a round by itself does not send."""
    from fedtan_hpc.batchnorm.layer import batchnorm_layers
    from fedtan_hpc.job.setup import network

    facts = config.data.facts()
    model = network(config, facts.shape, facts.classes)
    channels = [layer.num_features for layer in batchnorm_layers(model).values()]
    return {
        method.name: replace(method, average=method.average[:-1])
        for method in job_costs.methods(config, model, channels, ranks)
    }


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """The table."""
    heads = ["model", "backend", "method", "predicted, ms", "measured, ms", "error, %", "waiting"]
    rows = [heads, ["---"] * len(heads)]
    for row in results:
        cells = [row["model"], row["backend"], row["method"], f"{row['predicted_ms']:.1f}"]
        cells += [f"{row['measured_ms']:.1f}", f"{100 * row['error']:+.1f}"]
        rows.append([*cells, f"{row['terms_ms']['waiting']:.1f}"])
    print("\n".join(f"| {' | '.join(row)} |" for row in rows), file=sys.stderr)


def setting(config: Config, repeats: int) -> dict[str, Any]:
    """What was run, on what."""
    return benchmark.setting(
        config,
        shape=list(config.data.facts().shape),
        batch_size=config.batch_size,
        local_steps=config.local_steps,
        repeats=repeats,
    )


if __name__ == "__main__":
    main()
