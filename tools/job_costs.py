"""What a round of a job computes and sends, found with the job's own code: bytes and seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import benchmarks
from network_model import Method

from fedtan_hpc.choices import AlgorithmName
from fedtan_hpc.config import AlgorithmConfig, Config

_ROUNDS = 5
"""Rounds of local steps that are timed, after one that warms up."""


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

    from fedtan_hpc.messages import Shares, pack_derivatives, pack_moments

    one = Shares([1.0], [2])
    for c in channels:
        zeros = torch.zeros(c)
        yield pack_moments(0, one, zeros, zeros).nbytes
        yield pack_derivatives(0, one, torch.zeros(2 * c)).nbytes


def _average(model: Any) -> tuple[int, ...]:
    from fedtan_hpc.average import ModelSum

    total = ModelSum(model, counters=True)
    total.add(model, 1.0)
    return _sent(total.over_ranks)


def _gradients(model: Any) -> tuple[int, ...]:
    from fedtan_hpc.pooled_gradients import pool_gradients

    return _sent(lambda: pool_gradients([model], [1.0]))


def _sent(send: Callable[[], object]) -> tuple[int, ...]:
    """Bytes of the messages in ``send``, by the job's own counter; sizes are their mean."""
    from fedtan_hpc import comm

    before = comm.training_traffic.copy()
    send()
    spent = comm.training_traffic.since(before)
    return (spent.payload // spent.sums,) * spent.sums


def step_seconds(config: Config) -> float:
    """Of a client's local step, alone on this machine: the median over some rounds.

    As in the job, a round's first step also draws the batches and makes the optimizer.
    """
    import torch

    from fedtan_hpc.algorithms import plan
    from fedtan_hpc.clients import Client
    from fedtan_hpc.local_training import Round

    torch.set_num_threads(config.threads or 1)
    alone = replace(config, algorithm=AlgorithmConfig(name=AlgorithmName.singleset))
    model, training, samples = _client(alone)
    now = Round(1, config.optimizer.lr, plan(alone, 1))
    seconds = []
    for _ in range(1 + _ROUNDS):
        start = time.perf_counter()
        training.start(model, Client(0, 1.0, samples), now).finish().item()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) / config.local_steps


def _client(config: Config) -> tuple[Any, Any, Any]:
    """A model on this machine's device, what trains it, and random samples for a round."""
    import torch

    from fedtan_hpc.data import Samples
    from fedtan_hpc.prepare import DTYPES, host, network

    [carrier] = benchmarks.carriers(config, ["auto"])
    facts, dtype = config.data.facts(), DTYPES[config.precision]
    model = network(config, facts.shape, facts.classes).to(carrier.device, dtype)
    size = config.batch_size * config.local_steps
    labels = torch.arange(size) % facts.classes
    samples = Samples(torch.randn(size, *facts.shape, dtype=dtype), labels).to(carrier.device)
    batch = samples[torch.arange(config.batch_size, device=carrier.device)]
    cohort = host(config, model, samples[:1], one_each=True, example=batch)
    return model, cohort.training, samples
