"""The messages and the computing of a job's round, found with the job's own code; loads torch."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from bench import benchmark, rounds, timing
from fedtan_hpc.batchnorm.conversion import batchnorm_layers
from fedtan_hpc.batchnorm.messages import ClientWeights, pack
from fedtan_hpc.config.algorithms import AUTO, synchronised_layers
from fedtan_hpc.config.enums import AlgorithmName, PrecisionName
from fedtan_hpc.config.schema import AlgorithmConfig, Config
from fedtan_hpc.distributed import counters
from fedtan_hpc.distributed.model_average import ModelSum
from fedtan_hpc.job.setup import DTYPES, network
from fedtan_hpc.probing.schedule import Schedule, automatic_layers
from fedtan_hpc.training.optimizers import trained_parameters
from fedtan_hpc.training.pooled_gradients import pool_gradients
from scaling.round_model import Load, Method

_REPEATS = 5
"""Counted rounds of each kind, after one that warms up."""


def build(config: Config) -> tuple[nn.Module, list[int]]:
    """Returns the job's network, and the number of channels of each BN layer."""
    info = config.data.info()
    model = network(config, info.shape, info.classes).to(DTYPES[config.precision])
    return model, [layer.num_features for layer in batchnorm_layers(model).values()]


def methods(
    config: Config, model: nn.Module, channels: Sequence[int], clients: int
) -> list[Method]:
    """Returns the messages of each method, as the job sends them.

    The last message of the average has the clients' losses; the job's counters leave it out.
    """
    algorithm = config.algorithm
    total = ModelSum(model, counters=True)
    total.add(model, 1.0)
    fedavg = Method("fedavg", (*_sent_by(total.all_reduce), 8 * (clients + 2)))
    if config.ranks_per_client > 1:
        trained = trained_parameters(model).values()
        fedavg = replace(
            fedavg,
            client_statistics=tuple(_statistics(config, channels)),
            client_gradients=(sum(value.nbytes for value in trained),),
        )
    every = algorithm.synchronise_every
    chosen = _synchronised(config, model)
    fedtan = replace(
        fedavg,
        name="fedtan",
        statistics=tuple(_statistics(config, chosen)),
        synchronised_steps=algorithm.synchronised_steps or 1,
        synchronise_every=1 if every in (None, AUTO) else every,
    )
    if config.ranks_per_client > 1:  # the other layers are local in a synchronised step
        beside = sorted(channels)
        for each in chosen:
            beside.remove(each)
        fedtan = replace(fedtan, client_statistics_beside=tuple(_statistics(config, beside)))
    in_the_paper = tuple(4 * values for c in chosen for values in (c, c, 2 * c))
    gradients = _sent_by(lambda: pool_gradients([model], [1.0]))
    everywhere = tuple(_statistics(config, channels))
    centralised = replace(
        fedtan,
        name="centralised",
        statistics=everywhere,
        gradients=gradients,
        client_gradients=(),
        client_statistics_beside=(),
    )
    return [
        fedtan,
        replace(fedtan, name="three_messages", statistics=in_the_paper),
        fedavg,
        replace(centralised, synchronised_steps=None, synchronise_every=1),
    ]


def _synchronised(config: Config, model: nn.Module) -> list[int]:
    """Returns the channels of each BN layer that FedTAN synchronises.

    Which ones a probe would choose is not known: they are taken to be the widest.
    """
    layers = batchnorm_layers(model)
    if synchronised_layers(config.algorithm) == AUTO:
        widest = sorted((layer.num_features for layer in layers.values()), reverse=True)
        return widest[: automatic_layers(config, len(layers))]
    names = Schedule(config, list(layers)).plan(1).layers
    return [each.num_features for name, each in layers.items() if names is None or name in names]


def _statistics(config: Config, channels: Sequence[int]) -> Iterator[int]:
    """Yields the bytes of each layer's messages: moments (two messages in float64), derivatives."""
    client, tag = ClientWeights([1.0], [2]), torch.zeros(2, dtype=torch.float64)
    is_double = config.precision is PrecisionName.float64
    for c in channels:
        for values in (c, c, 2 * c) if is_double else (2 * c, 2 * c):
            yield pack(tag, client, [torch.zeros(1, values)]).nbytes


def _sent_by(send: Callable[[], object]) -> tuple[int, ...]:
    """Returns the bytes of each message of ``send``; all get the mean of the job's counter."""
    before = counters.training_traffic.copy()
    send()
    spent = counters.training_traffic.since(before)
    return (spent.payload_bytes // spent.payload_messages,) * spent.payload_messages


def measured_load(config: Config) -> Load:
    """Measures the computing of one client alone on this machine: medians of alternating rounds.

    A round includes drawing the batches and making the optimizer, as in the job.  Messages are
    packed and unpacked, and not sent.
    """
    benchmark.prepare_process(config)
    [placement] = benchmark.placements(config, ["auto"])
    runs = local_rounds(config, placement.device)
    times = [
        [timing.slowest_seconds(run, placement.device) for run in runs] for _ in range(1 + _REPEATS)
    ]
    return load(config, [statistics.median(kind) for kind in zip(*times[1:], strict=True)])


def local_rounds(config: Config, device: torch.device) -> list[Callable[[], object]]:
    """Returns three rounds whose steps are all local, all synchronised, or all pool gradients."""
    algorithms = (
        AlgorithmConfig(name=AlgorithmName.singleset),
        AlgorithmConfig(name=AlgorithmName.fedtan, synchronised_steps=config.local_steps),
        AlgorithmConfig(name=AlgorithmName.centralised),
    )
    return [
        rounds.one_client(replace(config, algorithm=algorithm), device) for algorithm in algorithms
    ]


def load(config: Config, seconds: Sequence[float]) -> Load:
    """Returns the load of one client, given the seconds of ``local_rounds``."""
    local, synchronised, pooled = (each / config.local_steps for each in seconds)
    return Load(local, config.local_steps, config.batch_size, 1, synchronised, pooled)
