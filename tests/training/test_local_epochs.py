"""Clients that pass over their samples take as many steps as they have whole batches."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedtan_hpc.config.enums import CohortMode, OptimizerName, PartitionName, SamplingName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    CohortConfig,
    Config,
    OptimizerConfig,
    PartitionConfig,
)
from fedtan_hpc.data import datasets, partition
from fedtan_hpc.data.batching import BatchSampler
from fedtan_hpc.job import setup
from fedtan_hpc.job.setup import prepare
from fedtan_hpc.models import factory
from tests.helpers.jobs import run
from tests.helpers.methods import close, config
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU, distance, iid_config

ADAMW = OptimizerConfig(name=OptimizerName.adamw, lr=0.01, clip_norm=1.0)


def job(algorithm: str, **options: object) -> Config:
    """Returns a job of four unequal clients, two epochs of batches of 48 in each round."""
    defaults = {"local_steps": 5, "local_epochs": 2, "batch_size": 48, "rounds": 2}
    return config(algorithm, **{**defaults, **options})


def trained(options: Config) -> tuple[dict[str, Tensor], list[float], list[int]]:
    """Returns the global model, the training losses, and E_k of all clients."""
    trainer = prepare(options, CPU)
    losses = [record.train_loss for record in trainer.train([])]
    state = {k: v for k, v in trainer.model.state_dict().items() if k not in ("1.bias", "4.bias")}
    return state, losses, trainer.store.steps


def test_a_pass_is_all_whole_batches() -> None:
    sampler = BatchSampler(10, 99, seed=0, epochs=3)
    assert [sampler.steps_of(n) for n in (4, 10, 19, 20, 45)] == [3, 3, 3, 6, 12]
    indices = next(sampler.draw(25, client=0, round_number=1))
    assert indices.shape == (6, 10)
    assert all(len(set(indices[i : i + 2].flatten().tolist())) == 20 for i in (0, 2, 4))
    drawn = BatchSampler(10, 99, 0, SamplingName.replacement, epochs=2)
    assert next(drawn.draw(4, client=0, round_number=1)).shape == (2, 10)


def test_epochs_of_equal_clients_are_their_steps() -> None:
    """Six whole batches of 16 of 100 samples each; also with all steps synchronised."""
    for algorithm in ("fedtan", "centralised"):
        steps, losses, _ = trained(iid_config(algorithm, local_steps=6, rounds=2))
        options = iid_config(algorithm, local_steps=5, local_epochs=1, rounds=2)
        state, other_losses, counts = trained(options)
        assert counts == [6, 6]
        assert losses == other_losses
        assert all(torch.equal(state[name], value) for name, value in steps.items())


def test_a_plain_loop_over_the_batches_gives_the_same() -> None:
    """FedAvg of three unequal clients, with torch's BN and SGD."""
    options = job("fedavg", clients=3, clients_per_round=None, rounds=1)
    dataset = datasets.load(options.data, options.seed)
    labels = dataset.labels_N[dataset.train]
    parts = partition.split(labels, 3, options.partition, options.seed)
    start = factory.build(options.model, dataset.shape, dataset.classes, options.seed).double()
    average = {name: torch.zeros_like(v).double() for name, v in start.state_dict().items()}
    steps, mean_loss = [], 0.0
    for k, part in enumerate(parts):
        model, samples = copy.deepcopy(start), dataset.take(dataset.train[part])
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        orders = next(BatchSampler.of(options).draw(len(samples), k, 1))
        steps.append(len(orders))
        for indices in orders:
            batch = samples[indices]
            sgd.zero_grad()
            loss = nn.functional.cross_entropy(model(batch.inputs.double()), batch.labels)
            loss.backward()
            sgd.step()
            mean_loss += len(part) / len(labels) * float(loss.detach()) / len(orders)
        for name, value in model.state_dict().items():
            average[name] += len(part) / len(labels) * value.double()
    state, [train_loss], counts = trained(options)
    assert counts == steps
    assert len(set(steps)) > 1
    assert train_loss == pytest.approx(mean_loss, rel=1e-10)
    for name, value in state.items():
        if "num_batches" not in name:
            assert close(value.double(), average[name]), name


@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg"])
def test_unequal_clients_train_alike_in_all_ways(algorithm: str) -> None:
    """Alone, in lock-step, stacked as long as all have steps, and on two ranks."""
    options = job(algorithm, optimizer=ADAMW, cohort=CohortConfig(mode=CohortMode.sequential))
    expected, losses, steps = trained(options)
    assert len(set(steps)) > 2
    others = on_ranks(2, trained, options)
    options.cohort = CohortConfig(mode=CohortMode.stacked, max_stacked=2)
    for state, other_losses, _ in (*others, trained(options), *on_ranks(2, trained, options)):
        assert distance(state, expected) < 1e-10
        assert other_losses == pytest.approx(losses, rel=1e-10)


@pytest.mark.parametrize("algorithm", ["fedtan", "centralised"])
def test_clients_with_too_few_steps_are_one_line(algorithm: str, tmp_path: Path) -> None:
    options = job(algorithm, run_dir=str(tmp_path / "run"))
    if algorithm == "fedtan":
        options.algorithm = AlgorithmConfig(synchronised_steps=7)
    with pytest.raises(ConfigError) as caught:
        run(options)
    [line] = caught.value.mistakes
    assert caught.value.on_all_ranks
    assert ": allowed is " in line


@pytest.mark.parametrize("mode", [CohortMode.sequential, CohortMode.stacked])
def test_batches_are_read_in_the_order_of_their_use(mode: CohortMode) -> None:
    options = job("fedtan", cohort=CohortConfig(mode=mode), rounds=1)
    trainer = prepare(options, CPU)
    expected = [*(trainer._batch_order(1) or ())]
    used = []
    for client in range(options.clients):
        samples = trainer.store._load(client)

        def noted(draw, indices, samples=samples):  # type: ignore[no-untyped-def]
            used.append((draw.client, draw.step))
            return samples[indices]

        object.__setattr__(samples, "batch", noted)
    trainer.train([])
    assert used == expected
    assert setup.with_steps(options, trainer.store.sizes).local_steps == max(trainer.store.steps)


def test_partitions_of_equal_clients_may_train_centralised() -> None:
    options = job("centralised", clients_per_round=None, clients=3)
    options.partition = PartitionConfig(name=PartitionName.iid)
    assert len(trained(options)[1]) == 2
