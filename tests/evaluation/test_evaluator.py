"""Figures of global and private models, compared with plain loops over clients and samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedtan_hpc.config.enums import AlgorithmName, PartitionName, PrecisionName, ShiftName
from fedtan_hpc.config.schema import AlgorithmConfig, Config, PartitionConfig
from fedtan_hpc.data import datasets
from fedtan_hpc.data.feature_shift import clients_of_test, shift_of
from fedtan_hpc.evaluation.metrics import Evaluation, in_mix, over_clients
from fedtan_hpc.evaluation.records import RoundRecord
from fedtan_hpc.job.setup import prepare
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU

PARTITIONS = {
    "dirichlet": PartitionConfig(name=PartitionName.dirichlet, alpha=0.3),
    "shift": PartitionConfig(
        name=PartitionName.feature_shift, shift=ShiftName.rotation, strength=60.0
    ),
}


def config(method: str, kind: str, **options: object) -> Config:
    defaults: dict[str, Any] = {
        "algorithm": AlgorithmConfig(name=AlgorithmName(method)),
        "partition": PARTITIONS[kind],
        "precision": PrecisionName.float64,
        "clients": 4,
        "clients_per_round": 2,
        "rounds": 2,
        "local_steps": 2,
        "batch_size": 16,
        "seed": 1,
    }
    return Config(**{**defaults, **options})


def reported(options: Config) -> tuple[RoundRecord, dict[str, Any], dict[int, Any]]:
    """Returns the last record, the global model, and the private states of drawn clients."""
    trainer = prepare(options, CPU)
    record = trainer.train([])[-1]
    states = trainer.cohort.states
    own = {client: states.named(client, trainer.model) for client in states.drawn()}
    return record, dict(trainer.model.state_dict()), own


def scores(options: Config, state: dict[str, Any], inputs: torch.Tensor) -> torch.Tensor:
    model = prepare(options, CPU).model
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        return model(inputs.double())  # type: ignore[no-any-return]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("method", ["fedbn", "fedavg"])
def test_figures_are_those_of_plain_loops(method: str, kind: str, ranks: int) -> None:
    options = config(method, kind)
    dataset = datasets.load(options.data, options.seed)
    shift = shift_of(options.partition, 4)
    store = prepare(options, CPU).store
    test = dataset.take(dataset.test)
    owners = clients_of_test(len(test), 4, options.seed)
    for record, state, own in on_ranks(ranks, reported, options):
        mixed = shift.apply_mixed(test.inputs, owners) if shift else test.inputs
        on_test, in_own_mix, losses, count = [], [], 0.0, 0
        for client in own or range(4):
            mine = {**state, **own.get(client, {})}
            right = scores(options, mine, mixed).argmax(1) == test.labels
            on_test.append(float(right.double().mean()))
            seen = shift.apply(test.inputs, client) if shift else test.inputs
            right = scores(options, mine, seen).argmax(1) == test.labels
            labels = dataset.labels_N[store.partition[client]]
            in_own_mix.append(
                sum(
                    (labels == c).mean() * float(right[test.labels == c].double().mean())
                    for c in range(10)
                )
            )
            train = dataset.take(store.partition[client])
            count += len(train)
            seen = shift.apply(train.inputs, client) if shift else train.inputs
            losses += float(
                cross_entropy(scores(options, mine, seen), train.labels, reduction="sum")
            )
        assert record.pooled_train_loss == pytest.approx(losses / count, rel=1e-6)
        assert record.test_accuracy == pytest.approx(np.mean(on_test), abs=1e-9)
        if method == "fedavg":
            assert record.clients_test_accuracy_mean is None
            assert record.clients_judged is None
            continue
        assert record.clients_judged == len(own) == 3  # of 4, in two rounds with two each
        assert record.clients_test_accuracy_mean == record.test_accuracy
        assert record.clients_test_accuracy_spread == pytest.approx(
            np.std(on_test, ddof=1), abs=1e-9
        )
        assert record.clients_own_mix_accuracy_mean == pytest.approx(np.mean(in_own_mix), abs=1e-9)
        spread = np.std(in_own_mix, ddof=1)
        assert record.clients_own_mix_accuracy_spread == pytest.approx(spread, abs=1e-9)


def test_a_class_without_test_samples_is_left_out_of_the_mix() -> None:
    table = torch.tensor([[4.0, 2.0, 1.0], [0.0, 0.0, 0.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    loss, _, accuracy = in_mix(table, torch.tensor([0.25, 0.5, 0.25])).tolist()
    assert loss == pytest.approx((4 / 2 + 3 / 3) / 2)
    assert accuracy == pytest.approx((1 / 2 + 1) / 2)


def pooled_losses(options: Config) -> list[float | None]:
    return [record.pooled_train_loss for record in prepare(options, CPU).train([])]


@pytest.mark.parametrize("method", ["silobn", "fedtan"])
def test_training_samples_for_the_loss_may_be_fewer_or_none(method: str) -> None:
    everything, some, none = (
        on_ranks(2, pooled_losses, config(method, "dirichlet", eval_train_samples=n))[0][-1]
        for n in (10_000, 500, 0)
    )
    assert none is None
    assert everything is not None
    assert some != everything
    assert some == pytest.approx(everything, rel=0.3)


def evaluated(options: Config) -> tuple[int | None, float | None]:
    record = prepare(options, CPU).train([])[-1]
    return record.clients_judged, record.test_accuracy


def test_not_more_clients_are_evaluated_than_asked_for() -> None:
    options = config("silobn", "dirichlet", clients=9, clients_per_round=6, eval_clients=2)
    assert evaluated(options)[0] == 2
    assert len(set(on_ranks(3, evaluated, options))) == 1
    options.eval_clients = None
    assert (evaluated(options)[0] or 0) > 6


def test_mixing_alone_makes_no_models_of_their_own() -> None:
    """HBN's d has no part in evaluation: the global model is evaluated."""
    record, _, own = reported(config("hbn", "dirichlet"))
    assert own
    assert record.clients_judged is None
    assert record.clients_own_mix_accuracy_mean is None


def test_a_figure_that_a_client_does_not_have_is_left_out_of_mean_and_spread() -> None:
    """It is not finite, for example R^2 of a single sample."""
    figures = {0: 0.5, 1: float("-inf"), 2: float("nan"), 3: 0.7}
    rows = {k: (Evaluation(1.0, {"r2": v}), Evaluation(2.0, {"r2": v})) for k, v in figures.items()}
    found = over_clients(rows)
    for mean, spread in ((found.test, found.test_spread), (found.own, found.own_spread)):
        assert mean.metrics["r2"] == pytest.approx(0.6)
        assert spread.metrics["r2"] == pytest.approx(np.std([0.5, 0.7], ddof=1))
