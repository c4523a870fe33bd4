"""The probe against a chain rule that is written out, on any number of ranks, and its limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtan_hpc.config.algorithms import plan
from fedtan_hpc.config.enums import (
    AlgorithmName,
    CohortMode,
    ModelName,
    PartitionName,
    PrecisionName,
)
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    CohortConfig,
    Config,
    DataConfig,
    ModelConfig,
    PartitionConfig,
    ProbeConfig,
)
from fedtan_hpc.data.batching import Samples
from fedtan_hpc.data.client_store import Client
from fedtan_hpc.evaluation.probe_records import ProbeRecord
from fedtan_hpc.job.setup import prepare
from fedtan_hpc.job.trainer import Trainer
from fedtan_hpc.probing.deviation import deviations, norms
from fedtan_hpc.probing.mixed_statistics import CAUSES, GLOBAL
from fedtan_hpc.training.local_step import GradientSum, LocalRun, RoundContext
from tests.helpers.chain_rule import Pass
from tests.helpers.jobs import known
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU


def config(algorithm: str = "fedavg", **options: object) -> Config:
    """Three unequal clients, one of them with less than a batch; the first round is probed."""
    defaults: dict[str, object] = {
        "algorithm": AlgorithmConfig(name=AlgorithmName(algorithm)),
        "data": DataConfig(train_samples=200, test_samples=50),
        "model": ModelConfig(name=ModelName.mlp),
        "partition": PartitionConfig(name=PartitionName.dirichlet, alpha=0.3),
        "precision": PrecisionName.float64,
        "clients": 3,
        "rounds": 1,
        "local_steps": 2,
        "batch_size": 48,
        "eval_train_samples": 0,
        "probe": ProbeConfig(every=1),
    }
    return Config(**{**defaults, **options})  # type: ignore[arg-type]


def clients_of(trainer: Trainer) -> tuple[list[Client], RoundContext]:
    context = RoundContext(1, 0.1, plan(trainer.config, 1), GradientSum(trainer.model))
    return trainer.store.host(dict(enumerate(trainer.store.shares))), context


def probed_record(options: Config) -> ProbeRecord:
    trainer = prepare(options, CPU)
    trainer.train([])
    [record] = trainer.schedule.probes
    return record


def by_hand(options: Config) -> tuple[Pass, Pass, list[str]]:
    """Forward passes by own and by global moments, and the parameters' names as defined."""
    trainer = prepare(options, CPU)
    clients, context = clients_of(trainer)
    batches = [
        LocalRun(trainer.model, client, context, options, trainer.cohort.loss).next_batch()
        for client in clients
    ]
    weights = [client.weight for client in clients]
    assert isinstance(trainer.model, nn.Sequential)
    names = [name for name, _ in trainer.model.named_parameters()]
    return (
        Pass(trainer.model, batches, weights, forward_is_global=False),
        Pass(trainer.model, batches, weights, forward_is_global=True),
        names,
    )


@torch.no_grad()
def expected(options: Config) -> dict[str, list[Any]]:
    """(relative, cosine) by tensor and of all together, for each cause."""
    own, shared, names = by_hand(options)
    found: dict[str, list[Tensor]] = {}
    for name, halves in {**CAUSES, "global": GLOBAL}.items():
        gradients = (shared if halves.forward else own).gradients(halves.backward)
        found[name] = [gradients[each] for each in names]
    reference = found.pop("global")
    assert min(norms(reference)) < 1e-12 < 1e-2 < max(norms(reference))
    return {name: deviations(each, reference) for name, each in found.items()}


@pytest.mark.parametrize("mode", [CohortMode.sequential, CohortMode.stacked])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedtan", "centralised"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_each_cause_agrees_with_the_written_chain_rule(
    ranks: int, algorithm: str, mode: CohortMode
) -> None:
    """With 4 ranks one has no client."""
    options = config(algorithm, cohort=CohortConfig(mode=mode))
    records = on_ranks(ranks, probed_record, options)
    wanted = expected(options)
    for record in records:
        assert record.parameters[:3] == ["1.weight", "1.bias", "2.weight"]
        wanted["trained"] = wanted["both"]
        if algorithm != "fedavg":
            assert record.total_deviation.pop("trained") == 0.0
            del wanted["trained"]
        for cause, each in wanted.items():
            relative, cosine = zip(*each, strict=True)
            got = [*record.deviation[cause], record.total_deviation[cause]]
            assert got == pytest.approx(list(relative), abs=1e-9, nan_ok=False)
            got = [*record.cosine[cause], record.total_cosine[cause]]
            assert got == pytest.approx(list(cosine), abs=1e-9)
    assert wanted["both"][-1].relative > 0.1


@pytest.mark.parametrize("ranks", [1, 3])
def test_distances_of_statistics(ranks: int) -> None:
    """In the first BN layer, whose inputs do not depend on statistics."""
    options = config()
    record = on_ranks(ranks, probed_record, options)[-1]
    own, shared, _ = by_hand(options)
    with torch.no_grad():
        own.loss()
        shared.loss()
    index = int(record.layers[0])
    eps = 1e-5
    rows = record.mean_shift[0], record.log_variance_ratio[0], record.kl_divergence[0]
    for client in range(3):
        m, v = (each[client] for each in own.saved[index][1:])
        mean, variance = (each[client] for each in shared.saved[index][1:])
        ours = torch.distributions.Normal(m, (v + eps).sqrt())
        theirs = torch.distributions.Normal(mean, (variance + eps).sqrt())
        kl = torch.distributions.kl_divergence(ours, theirs).mean()
        shift = ((m - mean).abs() / (variance + eps).sqrt()).mean()
        ratio = (torch.log(v + eps) - torch.log(variance + eps)).abs().mean()
        got = [row[client] for row in rows]
        assert got == pytest.approx([float(shift), float(ratio), float(kl)], rel=1e-9)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedtan"])
def test_nothing_deviates_where_all_clients_hold_the_same_data(algorithm: str) -> None:
    options = config(algorithm, partition=PartitionConfig(name=PartitionName.iid))
    trainer = prepare(options, CPU)
    clients, context = clients_of(trainer)
    same = clients[0].samples
    assert isinstance(same, Samples)
    few = same[torch.arange(20)]
    clients = [Client(number, p, few) for number, p in enumerate((0.5, 0.3, 0.2))]
    measured = trainer.probe.measure(clients, context, [0, 1, 2])
    trainer.cohort.runner.run(clients, context, trainer.cohort.begin_round(context))
    record = trainer.probe.finish(measured, context)
    assert max(map(known, record.total_deviation.values())) < 1e-12
    assert min(map(known, record.total_cosine.values())) > 1 - 1e-12
    rows: list[Sequence[float | None]] = [*record.mean_shift, *record.kl_divergence]
    for each in [*rows, *record.deviation.values()]:
        assert max(abs(value) for value in each if value is not None) < 1e-12


def test_the_global_gradient_is_the_slope_of_the_pooled_loss() -> None:
    """By central differences of sum_k p_k F_k with pooled moments."""
    options = config()
    trainer = prepare(options, CPU)
    clients, context = clients_of(trainer)
    gradient = trainer.probe.measure(clients, context, [0, 1, 2]).sums[GLOBAL].tensors
    _, shared, names = by_hand(options)
    for name in names:
        values = shared.model.get_parameter(name).data.view(-1)
        for place in range(0, len(values), max(1, len(values) // 3)):
            with torch.no_grad():
                sides = []
                for step in (1e-6, -1e-6):
                    values[place] += step
                    sides.append(shared.loss())
                    values[place] -= step
            slope = (sides[0] - sides[1]) / 2e-6
            assert float(gradient[name].view(-1)[place]) == pytest.approx(slope, abs=1e-8)


def test_gradients_that_are_rounding_have_no_deviation() -> None:
    reference = [torch.tensor([3.0, 4.0]), torch.tensor([1e-8])]
    found = [torch.tensor([3.0, 5.0]), torch.tensor([2e-8])]
    first, second, whole = deviations(found, reference)
    assert first == pytest.approx((0.2, 29 / (5 * 34**0.5)))
    assert second == (None, None)
    assert whole.relative == pytest.approx(0.2)
    assert deviations([torch.full((2,), torch.nan)], reference[:1]) == [(None, None)] * 2
    assert deviations([torch.zeros(2)], reference[:1]) == [(1.0, None)] * 2
