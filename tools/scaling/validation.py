"""Predicted rounds against measured ones, for validate_prediction; loads torch."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from bench import benchmark, rounds, timing
from fedtan_hpc.config.enums import AlgorithmName
from fedtan_hpc.config.schema import AlgorithmConfig, Config
from fedtan_hpc.runtime import launcher_env
from fedtan_hpc.runtime.device import DevicePlacement
from scaling import job_costs, network_fit
from scaling.network_model import Network
from scaling.round_model import terms

_FIT_REPEATS = 5
"""A fit needs no more repeats than these."""
_METHODS = ("fedtan", "fedavg", "centralised")
Times = dict[tuple[str, str], list[float]]
"""Seconds of rounds by backend and kind; rounds of each rank alone have the backend ""."""


def validate(
    configs: Sequence[Config], backends: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
    """Returns a row for each network, backend and method; every rank calls it."""
    ranks = launcher_env.detect().world_size
    _, fits = network_fit.measure(configs[0], backends, ranks, min(repeats, _FIT_REPEATS))
    networks = {network.name: network for network in fits}
    rows: list[dict[str, Any]] = []
    for config in configs:
        times = _measure(config, benchmark.placements(config, backends), repeats)
        rows += _compare(config, networks, times, ranks)
    return rows


def _measure(config: Config, placements: Sequence[DevicePlacement], repeats: int) -> Times:
    benchmark.prepare_process(config)
    device = placements[0].device
    local = job_costs.local_rounds(config, device)
    federated = {}
    for name in _METHODS:
        algorithm = AlgorithmConfig(name=AlgorithmName(name))
        federated[name] = rounds.one_client(replace(config, algorithm=algorithm), device)
    times: Times = {}
    for repeat in range(repeats + 1):  # the first is a warm-up
        seconds = {
            ("", str(kind)): timing.slowest_seconds(run, device) for kind, run in enumerate(local)
        }
        for placement in placements:
            with benchmark.process_group(config, placement):
                for name, run in federated.items():
                    seconds[placement.backend, name] = timing.slowest_seconds(run, device)
        if repeat:
            for key, value in seconds.items():
                times.setdefault(key, []).append(value)
        benchmark.show_progress(repeat, repeats)
    with benchmark.process_group(config, placements[0]):
        # Only rounds of each rank alone differ between ranks; the others are the slowest rank's.
        return {key: timing.mean_over_ranks(values, device) for key, values in times.items()}


def _compare(
    config: Config, networks: Mapping[str, Network], times: Times, ranks: int
) -> Iterator[dict[str, Any]]:
    local = [statistics.median(values) for (backend, _), values in times.items() if not backend]
    load = job_costs.load(config, local)
    model, channels = job_costs.build(config)
    methods = {m.name: m for m in job_costs.methods(config, model, channels, ranks)}
    for (backend, name), values in times.items():
        if backend:
            network = networks.get(backend, Network(name=backend, alpha_s=0, beta_s_per_byte=0))
            # A timed round does not send the clients' losses.
            method = replace(methods[name], average=methods[name].average[:-1])
            predicted = terms(method, load, network, ranks)
            seconds = statistics.median(values)
            yield {
                "model": str(config.model.name),
                "backend": backend,
                "method": name,
                "predicted_ms": 1000 * predicted.seconds,
                "measured_ms": 1000 * seconds,
                "error": predicted.seconds / seconds - 1,
                "terms_ms": {term: 1000 * value for term, value in asdict(predicted).items()},
                "all_ms": [1000 * value for value in values],
            }
