"""Predict a round on more ranks than are at hand, and say what would make it efficient.

    python tools/predict_scaling.py model=resnet20 ranks=[8,64,1024,4096] network=nvlink_ndr out=DIR
    python tools/predict_scaling.py network=[network.json,ethernet25] compute_seconds=0.02
    python tools/predict_scaling.py clients=1024 data.samples=99999 ranks=[64,1024]

network=[...]        nvlink_ndr, ethernet25, wan50ms, or files of tools/fit_network.py
                     (default [nvlink_ndr,ethernet25,wan50ms])
ranks=[...]          numbers of ranks (default [8,64,1024,4096])
clients_per_rank=N   clients of every rank, however many ranks (default 1); with clients=N in its
                     place the job's clients are shared out over the ranks
compute_seconds=S    of a local step of one client (default: measured here, on random samples)
out=DIR              folder of prediction.json, .md and .png (default prediction)

All other words are options of the job.  Methods: fedtan; three_messages, which is FedTAN as the
paper sends it, with three float32 messages a layer; fedavg; centralised.  The messages are those of
the job, the network is that of tools/network_model.py, and nothing overlaps with anything.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import benchmark
from scaling.network_model import PRESETS, Network
from scaling.round_model import Load, Method

from fedtan_hpc import cli
from fedtan_hpc.config.enums import AlgorithmName
from fedtan_hpc.config.errors import ConfigError, format_option_error
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env
from scaling import job_costs, network_model, prediction_report, round_model

OWN = ("network", "ranks", "clients_per_rank", "compute_seconds", "out")
TARGET = 0.9
"""The efficiency that remedies aim at."""
_DEFAULTS = ["data=synthetic", "model=resnet20"]


@dataclass(frozen=True)
class Asked:
    """The command line."""

    config: Config
    networks: list[Network]
    ranks: list[int]
    clients_per_rank: int | None
    """None: the job's clients are shared out."""
    compute_seconds: float | None
    out: Path

    def clients(self, ranks: int) -> tuple[int, int]:
        """Of the busiest rank, and of all, in a round."""
        if self.clients_per_rank is not None:
            return self.clients_per_rank, self.clients_per_rank * ranks
        taking_part = self.config.clients_per_round or self.config.clients
        return math.ceil(taking_part / ranks), taking_part


def main(words: Sequence[str] | None = None) -> None:
    """Predict and write; exit codes as those of the job."""
    words = sys.argv[1:] if words is None else list(words)
    with cli.exit_codes("predict_scaling"):
        if launcher_env.rank_hint() != 0:
            return
        if options.shows_help(words, __doc__):
            return
        asked = understood(words)
        launcher_env.detect()
        options.check_plotting()
        options.check_writable(asked.out / "prediction.json")
        setting, found = predict(asked)
        command = f"python tools/predict_scaling.py {shlex.join(words)}"
        prediction_report.write(asked.out, setting, found, command)


def understood(words: Sequence[str]) -> Asked:
    """The words, checked; raises ``ConfigError``."""
    own, job = options.split(words, OWN)
    config = options.composed([*_DEFAULTS, *job])
    check(config)
    if config.algorithm.name is not AlgorithmName.fedtan:
        remedy = "leave it out: fedavg and centralised are predicted beside it"
        raise ConfigError(format_option_error("algorithm", config.algorithm.name, "fedtan", remedy))
    shared = any(word.lstrip("+").startswith("clients=") for word in job)
    if shared and "clients_per_rank" in own:
        remedy = "leave one of them out"
        raise ConfigError(
            format_option_error("clients", config.clients, "without clients_per_rank", remedy)
        )
    ranks = _whole(own.get("ranks", "ranks=[8,64,1024,4096]"), "[8,64]")
    [clients] = _whole(own.get("clients_per_rank", "clients_per_rank=1"), "1")[:1]
    return Asked(
        config=config,
        networks=_networks(own.get("network", f"network=[{','.join(PRESETS)}]")),
        ranks=sorted(ranks),
        clients_per_rank=None if shared else clients,
        compute_seconds=_seconds(own.get("compute_seconds")),
        out=Path(options.folder(own.get("out", "out=prediction"))),
    )


def _whole(word: str, example: str) -> list[int]:
    """Whole numbers from 1."""
    name, found = word.partition("=")[0], options.values(word, example)
    for value in found:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            remedy = f"for example {name}={example}"
            raise ConfigError(format_option_error(name, value, "whole numbers >= 1", remedy))
    return found


def _seconds(word: str | None) -> float | None:
    if word is None:
        return None
    [value] = options.values(word, "0.02")[:1]
    if not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        remedy = "for example compute_seconds=0.02, or leave it out"
        raise ConfigError(
            format_option_error("compute_seconds", value, "a finite number > 0", remedy)
        )
    return float(value)


def _networks(word: str) -> list[Network]:
    """All that the names and files have."""
    found = []
    for name in options.values(word, "[nvlink_ndr,network.json]"):
        found += [PRESETS[name]] if name in PRESETS else _from_file(str(name))
    return found


def _from_file(path: str) -> list[Network]:
    try:
        networks, why = network_model.read(Path(path)), "it has no network; fit on two ranks"
    except (OSError, ValueError) as error:
        networks, why = [], getattr(error, "strerror", None) or str(error)
    if not networks:
        allowed = f"{' | '.join(PRESETS)} | a file of tools/fit_network.py"
        raise ConfigError(format_option_error("network", path, allowed, f"name another ({why})"))
    return [replace(network, name=f"{network.name} ({path})") for network in networks]


def predict(asked: Asked) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was assumed, and a row for each network, number of ranks and method."""
    from fedtan_hpc.batchnorm.layer import batchnorm_layers
    from fedtan_hpc.job import setup  # torch loads here

    config, facts = asked.config, asked.config.data.facts()
    model = setup.network(config, facts.shape, facts.classes)
    channels = [layer.num_features for layer in batchnorm_layers(model).values()]
    if not channels:
        remedy = "choose another network, or leave model.norm out"
        raise ConfigError(
            format_option_error("model", config.model.name, "a network with BN layers", remedy)
        )
    one = _of_one_client(asked)
    cases = [(asked.clients(ranks), ranks) for ranks in asked.ranks]
    rows = [
        _row(method, replace(one, clients=of_rank), network, ranks)
        for network in asked.networks
        for (of_rank, of_all), ranks in cases
        for method in job_costs.methods(config, model, channels, of_all)
    ]
    return _setting(asked, model, channels, one), rows


def _of_one_client(asked: Asked) -> Load:
    """What it computes, as given or measured here."""
    config, step = asked.config, asked.compute_seconds
    if step is None:
        return job_costs.of_one_client(config)
    return Load(step, config.local_steps, config.batch_size, 1)


def _setting(asked: Asked, model: Any, channels: Sequence[int], one: Load) -> dict[str, Any]:
    config = asked.config
    return benchmark.setting(
        config,
        model=config.model.name,
        shape=list(config.data.facts().shape),
        batchnorm_layers=len(channels),
        channels=sum(channels),
        parameters=sum(value.numel() for value in model.parameters()),
        target_efficiency=TARGET,
        local_steps=config.local_steps,
        batch_size=config.batch_size,
        step_seconds=one.step_seconds,
        synchronised_step_seconds=one.synchronised_step_seconds,
        pooled_step_seconds=one.pooled_step_seconds,
        step_measured_here=asked.compute_seconds is None,
        networks=[asdict(network) for network in asked.networks],
    )


def _row(method: Method, load: Load, network: Network, ranks: int) -> dict[str, Any]:
    terms = round_model.terms(method, load, network, ranks)
    return {
        "network": network.name,
        "ranks": ranks,
        "method": method.name,
        "clients_of_a_rank": load.clients,
        "seconds_a_round": terms.seconds,
        "efficiency": terms.efficiency,
        "largest_term": terms.largest,
        **{f"{name}_seconds": value for name, value in asdict(terms).items()},
        "for_target": round_model.remedies(method, load, network, ranks, TARGET),
    }


if __name__ == "__main__":
    main()
