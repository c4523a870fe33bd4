"""What a round of a job computes and sends, found with the job's own code: bytes and seconds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from bench import benchmark, rounds

from fedtan_hpc.config.enums import AlgorithmName
from fedtan_hpc.config.schema import AlgorithmConfig, Config
from scaling.round_model import Load, Method

_ROUNDS = 5
"""Rounds of each kind that are timed, after one that warms up."""


def methods(config: Config, model: Any, channels: Sequence[int], clients: int) -> list[Method]:
    """The messages of each, as the job sends them; the losses are in none of its counters."""
    options, losses = config.algorithm, 8 * (clients + 2)
    average, gradients = _average(model), _gradients(model)
    fedavg = Method("fedavg", (*average, losses))
    fedtan = replace(
        fedavg,
        name="fedtan",
        statistics=tuple(_statistics(channels)),
        synchronised_steps=options.synchronised_steps or 1,
        synchronise_every=options.synchronise_every or 1,
    )
    paper = tuple(4 * values for c in channels for values in (c, c, 2 * c))
    return [
        fedtan,
        replace(fedtan, name="three_messages", statistics=paper),
        fedavg,
        replace(
            fedtan,
            name="centralised",
            gradients=gradients,
            synchronised_steps=None,
            synchronise_every=1,
        ),
    ]


def _statistics(channels: Sequence[int]) -> Iterator[int]:
    """Bytes of the two messages of each layer, made as training makes them."""
    import torch

    from fedtan_hpc.batchnorm.messages import ClientWeights, pack_derivatives, pack_moments

    one = ClientWeights([1.0], [2])
    for c in channels:
        zeros = torch.zeros(c)
        yield pack_moments(0, one, zeros, zeros).nbytes
        yield pack_derivatives(0, one, torch.zeros(2 * c)).nbytes


def _average(model: Any) -> tuple[int, ...]:
    from fedtan_hpc.distributed.model_average import ModelSum

    total = ModelSum(model, counters=True)
    total.add(model, 1.0)
    return _sent(total.over_ranks)


def _gradients(model: Any) -> tuple[int, ...]:
    from fedtan_hpc.training.pooled_gradients import pool_gradients

    return _sent(lambda: pool_gradients([model], [1.0]))


def _sent(send: Callable[[], object]) -> tuple[int, ...]:
    """Bytes of the messages in ``send``, by the job's own counter; sizes are their mean."""
    from fedtan_hpc.distributed import counters

    before = counters.training_traffic.copy()
    send()
    spent = counters.training_traffic.since(before)
    return (spent.payload // spent.sums,) * spent.sums


def of_one_client(config: Config) -> Load:
    """What a client computes in a round, alone on this machine: medians over alternating rounds.

    As in the job, a round's first step also draws the batches and makes the optimizer.  Messages
    are made and read, and sent to nobody.
    """

    benchmark.settle(config)
    [carrier] = benchmark.carriers(config, ["auto"])
    runs = alone(config, carrier.device)
    taken = [[rounds.seconds(run, carrier.device) for run in runs] for _ in range(1 + _ROUNDS)]
    return load(config, [statistics.median(times) for times in zip(*taken[1:], strict=True)])


def alone(config: Config, where: Any) -> list[Callable[[], object]]:
    """Rounds of a client all of whose steps are local; have global statistics; pooled gradients."""
    every = AlgorithmConfig(name=AlgorithmName.fedtan, synchronised_steps=config.local_steps)
    algorithms = (
        AlgorithmConfig(name=AlgorithmName.singleset),
        every,
        AlgorithmConfig(name=AlgorithmName.centralised),
    )
    return [
        rounds.one_client(replace(config, algorithm=algorithm), where) for algorithm in algorithms
    ]


def load(config: Config, seconds: Sequence[float]) -> Load:
    """Of one client, from what the rounds of ``alone`` take."""
    local, synchronised, pooled = (each / config.local_steps for each in seconds)
    return Load(local, config.local_steps, config.batch_size, 1, synchronised, pooled)
