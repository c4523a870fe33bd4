"""Every method against its re-statement, on ranks, with clients that not every round draws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedtan_hpc.config.algorithms import ALGORITHMS
from fedtan_hpc.config.enums import (
    AlgorithmName,
    CohortMode,
    ModelSource,
    NormName,
    PartitionName,
    ServerOptimizerName,
)
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    CohortConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    PartitionConfig,
)
from fedtan_hpc.data import datasets, partition
from fedtan_hpc.data.batching import BatchSampler
from fedtan_hpc.job.setup import prepare
from fedtan_hpc.models import factory
from tests.helpers.methods import RESTATED, close, config, simulated, times_drawn, trained
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU


def compare(options: Config, ranks: int) -> None:
    expected, own, losses = simulated(options)
    times = times_drawn(options)
    for state, kept, train_losses in on_ranks(ranks, trained, options):
        for name, value in expected.items():
            assert close(state[name], value), name
        assert train_losses == pytest.approx(losses, rel=1e-10)
        for client, values in kept.items():
            for name, value in values.items():
                if name in own[client]:
                    assert close(value, own[client][name]), (client, name)
                else:
                    assert name.endswith("num_batches_tracked")
                    assert int(value) == options.local_steps * times[client]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", RESTATED)
def test_a_method_does_what_its_definition_says(method: str, ranks: int) -> None:
    compare(config(method), ranks)


def test_every_method_is_restated() -> None:
    assert set(RESTATED) == {str(name) for name in ALGORITHMS} == {str(n) for n in AlgorithmName}


@pytest.mark.parametrize("mode", [CohortMode.stacked, CohortMode.sequential])
@pytest.mark.parametrize("method", [m for m in RESTATED if m not in ("fbn", "hbn")])
def test_stacked_clients_do_the_same(method: str, mode: CohortMode) -> None:
    compare(config(method, cohort=CohortConfig(mode=mode, max_stacked=2)), 1)


OPTIONS: dict[str, tuple[str, dict[str, object]]] = {
    "all steps synchronised": ("fedtan", {"algorithm.synchronised_steps": 3}),
    "none synchronised": ("fedtan", {"algorithm.synchronised_steps": 0}),
    "every second round": ("fedtan", {"algorithm.synchronise_every": 2}),
    "proximal": ("fedavg", {"client.proximal_mu": 0.5}),
    "proximal, private": ("fedbn", {"client.proximal_mu": 0.5}),
    "momentum": ("fedtan", {"server.optimizer": "momentum"}),
    "adam": ("fedavg", {"server.optimizer": "adam"}),
    "yogi": ("fedavg", {"server.optimizer": "yogi", "server.lr": 0.05}),
    "adam, private": ("silobn", {"server.optimizer": "adam"}),
    "adam, private mixing": ("hbn", {"server.optimizer": "adam"}),
    "momentum, frozen": ("fixbn", {"server.optimizer": "momentum"}),
    "no normalization": ("fedavg", {"model.norm": "none"}),
    "centralised, no normalization": ("centralised", {"model.norm": "none"}),
}


@pytest.mark.parametrize(
    ("case", "stacked"),
    [
        (case, stacked)
        for case in OPTIONS
        for stacked in (False, True)
        if not (stacked and "mixing" in case)
    ],
)
def test_options_combine_with_methods(case: str, stacked: bool) -> None:
    method, changes = OPTIONS[case]
    options = config(method)
    for option, value in changes.items():
        group, _, name = option.partition(".")
        kinds: dict[str, Callable[[object], object]] = {
            "server.optimizer": ServerOptimizerName,
            "model.norm": NormName,
        }
        setattr(getattr(options, group), name, kinds.get(option, type(value))(value))
    if stacked:
        options.cohort = CohortConfig(mode=CohortMode.stacked)
    compare(options, 1 if stacked else 2)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_centralised_is_sgd_on_the_pooled_batches(momentum: float) -> None:
    """Compares with torch's BN and one SGD for all rounds on the concatenated batches."""
    options = config(
        "centralised",
        partition=PartitionConfig(name=PartitionName.iid),
        optimizer=OptimizerConfig(lr=0.05, momentum=momentum, weight_decay=1e-3),
        clients=3,
        clients_per_round=None,
    )
    dataset = datasets.load(options.data, options.seed)
    labels = dataset.labels_N[dataset.train]
    parts = partition.split(labels, 3, options.partition, options.seed)
    clients = [dataset.take(dataset.train[part]) for part in parts]
    model = factory.build(options.model, dataset.shape, dataset.classes, options.seed).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=1e-3)
    for number in (1, 2, 3):
        orders = [
            next(BatchSampler(16, 3, options.seed).draw(len(c), k, number))
            for k, c in enumerate(clients)
        ]
        for step in range(3):
            batches = [c[order[step]] for c, order in zip(clients, orders, strict=True)]
            x = torch.cat([batch.inputs.double() for batch in batches])
            y = torch.cat([batch.labels for batch in batches])
            sgd.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            sgd.step()
    for state, _, _ in on_ranks(2, trained, options):
        for name, value in model.state_dict().items():
            assert close(state[name].double(), value.double()), name


def test_a_round_of_one_step_of_fedtan_is_one_of_centralised() -> None:
    """With E = 1 both give one model up to rounding, for any partition."""
    options = config(
        "fedtan", local_steps=1, optimizer=OptimizerConfig(lr=0.1), clients_per_round=None
    )
    [fedtan, *_] = on_ranks(2, trained, options)
    options.algorithm = AlgorithmConfig(name=AlgorithmName.centralised)
    [centralised, *_] = on_ranks(2, trained, options)
    for name, value in centralised[0].items():
        assert close(fedtan[0][name].double(), value.double()), name


ODD = {
    "frozen": ["fedtan", "fedavg", "fedbn", "centralised"],
    "unused": ["fedtan", "fedavg", "centralised"],
    "cumulative": ["fedtan", "silobn", "fedbn", "singleset"],
    "counting": ["fedtan", "fixbn", "silobn"],
    "spectral": ["fedtan", "fixbn"],
}
"""Unusual networks, and the methods that could fail on them."""


@pytest.mark.parametrize(("network", "method"), [(n, m) for n in ODD for m in ODD[n]])
def test_odd_networks_train_alike_in_every_way(network: str, method: str) -> None:
    """In lock-step, stacked, and on two ranks; a frozen parameter does not change."""
    options = config(
        method,
        model=ModelConfig(source=ModelSource.import_, target=f"tests.helpers.networks:{network}"),
        optimizer=OptimizerConfig(lr=0.05, momentum=0.9, weight_decay=0.01),
        cohort=CohortConfig(mode=CohortMode.sequential),
        rounds=4,
    )
    state, own, losses = trained(options)
    others = on_ranks(2, trained, options)
    if network not in ("counting", "spectral"):  # they update buffers in place
        options.cohort.mode = CohortMode.stacked
        others.append(trained(options))
    for other, of_clients, other_losses in others:
        assert other_losses == pytest.approx(losses, rel=1e-9)
        for name, value in state.items():
            assert close(other[name].double(), value.double()), name
        for client, values in own.items():
            for name, value in values.items():
                assert close(of_clients[client][name].double(), value.double()), (client, name)
    if network == "frozen":
        before = prepare(options, CPU).model.state_dict()
        assert torch.equal(state["1.weight"], before["1.weight"])
