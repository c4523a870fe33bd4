"""Predict a round on more ranks than are at hand, and what would make it efficient.

    python tools/predict_scaling.py model=resnet20 ranks=[8,64,1024,4096] network=nvlink_ndr out=DIR
    python tools/predict_scaling.py network=[network.json,ethernet25] compute_seconds=0.02
    python tools/predict_scaling.py clients=1024 data.samples=99999 ranks=[64,1024]

network=[...]        nvlink_ndr, ethernet25, wan50ms, or files of tools/fit_network.py
                     (default [nvlink_ndr,ethernet25,wan50ms])
ranks=[...]          numbers of ranks (default [8,64,1024,4096])
clients_per_rank=N   clients of each rank, for any number of ranks (default 1); clients=N instead
                     divides the job's clients among the ranks.  With ranks_per_client=R each R
                     ranks count as one, and a step takes 1 / R of its time
compute_seconds=S    seconds of a local step of one client (default: measured on this machine, with
                     random samples)
out=DIR              folder for prediction.json, .md and .png (default prediction)

All other words are options of the job; without an experiment the network is model=resnet20, and
the data are data=synthetic.  Methods: fedtan; three_messages, which is FedTAN with the
paper's three float32 messages a layer; fedavg; centralised.  Messages are the job's, the network is
the model of tools/scaling/network_model.py, and nothing overlaps.  Where a probe chooses layers,
the widest are taken; where it chooses rounds (synchronise_every=auto), all are synchronised.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import benchmark
from fedtan_hpc.config.enums import AlgorithmName
from fedtan_hpc.config.errors import ConfigError, format_option_error
from fedtan_hpc.config.path_options import expanded
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env
from scaling import network_model, prediction_report, round_model
from scaling.network_model import PRESETS, Network
from scaling.round_model import Load, Method

OPTIONS = ("network", "ranks", "clients_per_rank", "compute_seconds", "out")
TARGET = 0.9
"""Efficiency for which the report gives remedies."""
_DEFAULTS = ["data=synthetic", "model=resnet20"]
_MOST_SECONDS = 86400.0


@dataclass(frozen=True)
class Request:
    """The command line."""

    config: Config
    networks: list[Network]
    ranks: list[int]
    clients_per_rank: int | None
    """None: the job's clients are divided among the ranks."""
    compute_seconds: float | None
    out: Path

    def clients(self, ranks: int) -> tuple[int, int]:
        """Returns a round's clients on the busiest rank, and on all ranks."""
        groups = ranks // self.config.ranks_per_client
        if self.clients_per_rank is not None:
            return self.clients_per_rank, self.clients_per_rank * groups
        participants = self.config.clients_per_round or self.config.clients
        return math.ceil(participants / groups), participants


def run(words: Sequence[str]) -> None:
    """Predicts, and writes the report."""
    request = parse(words)
    launcher_env.detect()
    options.check_plotting()
    options.check_writable(request.out / "prediction.json")
    setting, rows = predict(request)
    command = f"python tools/predict_scaling.py {shlex.join(words)}"
    prediction_report.write(request.out, setting, rows, command)


def parse(words: Sequence[str]) -> Request:
    """Returns the checked command line; raises ``ConfigError``."""
    tool_options, job_words = options.split(words, OPTIONS)
    config = options.composed(benchmark.with_defaults(_DEFAULTS, job_words))
    check(config)
    if config.algorithm.name is not AlgorithmName.fedtan:
        remedy = "leave it out: fedavg and centralised are predicted beside it"
        raise ConfigError(format_option_error("algorithm", config.algorithm.name, "fedtan", remedy))
    divided = any(word.lstrip("+").startswith("clients=") for word in job_words)
    if divided and "clients_per_rank" in tool_options:
        allowed, remedy = "without clients_per_rank", "leave one of them out"
        raise ConfigError(format_option_error("clients", config.clients, allowed, remedy))
    ranks = benchmark.whole_numbers(tool_options.get("ranks", "ranks=[8,64,1024,4096]"), "[8,64]")
    size = config.ranks_per_client
    if wrong := [number for number in ranks if number % size]:
        allowed, remedy = f"multiples of ranks_per_client, {size}", f"try ranks=[{size},{8 * size}]"
        raise ConfigError(format_option_error("ranks", wrong[0], allowed, remedy))
    per_rank = tool_options.get("clients_per_rank", "clients_per_rank=1")
    clients = benchmark.whole_number(per_rank, "1")
    return Request(
        config=config,
        networks=_networks(tool_options.get("network", f"network=[{','.join(PRESETS)}]")),
        ranks=sorted(ranks),
        clients_per_rank=None if divided else clients,
        compute_seconds=_compute_seconds(tool_options.get("compute_seconds")),
        out=Path(options.folder(tool_options.get("out", "out=prediction"))),
    )


def _compute_seconds(word: str | None) -> float | None:
    if word is None:
        return None
    values = options.values(word, "0.02")
    value: Any = values[0] if len(values) == 1 else values
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= _MOST_SECONDS:
        allowed = f"a number > 0, {_MOST_SECONDS:g} at most"
        remedy = "for example compute_seconds=0.02, or leave it out"
        raise ConfigError(format_option_error("compute_seconds", value, allowed, remedy))
    return float(value)


def _networks(word: str) -> list[Network]:
    networks = []
    for name in options.values(word, "[nvlink_ndr,network.json]"):
        networks += [PRESETS[str(name)]] if str(name) in PRESETS else _from_file(str(name))
    return networks


def _from_file(path: str) -> list[Network]:
    try:
        networks, reason = network_model.read(expanded(path)), "it has no network; fit on two ranks"
    except (OSError, ValueError) as error:
        networks, reason = [], getattr(error, "strerror", None) or str(error)
    if not networks:
        allowed = f"{' | '.join(PRESETS)} | a file of tools/fit_network.py"
        raise ConfigError(format_option_error("network", path, allowed, f"name another ({reason})"))
    return [replace(network, name=f"{network.name} ({path})") for network in networks]


def predict(request: Request) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the assumptions, and a row for each network, number of ranks and method."""
    from scaling import job_costs  # torch loads here

    config, step = request.config, request.compute_seconds
    model, channels = job_costs.build(config)
    if not channels:
        allowed = "a network with BN layers"
        remedy = "choose another network, or leave model.norm out"
        raise ConfigError(format_option_error("model", config.model.name, allowed, remedy))
    if step is None:
        load = job_costs.measured_load(config)
    else:
        load = Load(step, config.local_steps, config.batch_size, 1)
    load = load.divided(config.ranks_per_client)
    cases = [(*request.clients(ranks), ranks) for ranks in request.ranks]
    rows = [
        _row(method, replace(load, clients=busiest), network, ranks)
        for network in request.networks
        for busiest, clients, ranks in cases
        for method in job_costs.methods(config, model, channels, clients)
    ]
    parameters = sum(value.numel() for value in model.parameters())
    return _setting(request, parameters, channels, load), rows


def _setting(
    request: Request, parameters: int, channels: Sequence[int], load: Load
) -> dict[str, Any]:
    config = request.config
    return benchmark.setting(
        config,
        model=config.model.name,
        shape=list(config.data.info().shape),
        batchnorm_layers=len(channels),
        channels=sum(channels),
        parameters=parameters,
        target_efficiency=TARGET,
        local_steps=config.local_steps,
        batch_size=config.batch_size,
        step_seconds=load.step_seconds,
        synchronised_step_seconds=load.synchronised_step_seconds,
        pooled_step_seconds=load.pooled_step_seconds,
        step_measured_here=request.compute_seconds is None,
        networks=[asdict(network) for network in request.networks],
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


if __name__ == "__main__" and launcher_env.rank_hint() == 0:
    benchmark.main("predict_scaling", __doc__, run)
