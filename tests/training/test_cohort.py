"""Rounds give one result for any number of ranks and any way to run clients."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fedtan_hpc
from fedtan_hpc.config.algorithms import plan
from fedtan_hpc.config.enums import (
    AlgorithmName,
    CohortMode,
    DataName,
    ModelName,
    ModelSource,
    ParticipationName,
    PartitionName,
    PrecisionName,
)
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    CohortConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PartitionConfig,
)
from fedtan_hpc.data.batching import Samples
from fedtan_hpc.data.client_store import Client
from fedtan_hpc.distributed import process_group
from fedtan_hpc.evaluation.records import RoundRecord
from fedtan_hpc.job.setup import host, prepare
from fedtan_hpc.training.client_runners import LockstepRunner, StackedRunner
from fedtan_hpc.training.local_step import RoundContext
from tests.helpers import networks, pooled
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU, distance, train_round

RANKS = (1, 2, 3, 4)


def config(algorithm: str, case: str, **options: object) -> Config:
    """Returns a job with unequal clients, some of them smaller than a batch."""
    per_round = {"all": None, "some": 3, "fewer than ranks": 2}[case]
    defaults: dict[str, object] = {
        "algorithm": AlgorithmConfig(name=AlgorithmName(algorithm)),
        "partition": PartitionConfig(name=PartitionName.dirichlet, alpha=0.2),
        "optimizer": OptimizerConfig(lr=0.05, momentum=0.9, weight_decay=1e-4),
        "participation": ParticipationName.weighted
        if case == "some"
        else ParticipationName.uniform,
        "precision": PrecisionName.float64,
        "clients": 9,
        "clients_per_round": per_round,
        "rounds": 5,
        "local_steps": 3,
        "batch_size": 64,
        "eval_every": 1,
        "eval_train_samples": 0,
        "cohort": CohortConfig(mode=CohortMode.sequential),
    }
    return Config(**{**defaults, **options})  # type: ignore[arg-type]


def trained(options: Config) -> tuple[dict[str, Tensor], list[RoundRecord], list[int]]:
    """Returns the global model, the records of the rounds, and the sizes of the clients."""
    trainer = prepare(options, CPU)
    records = trainer.train([])
    return dict(trainer.model.state_dict()), records, trainer.store.sizes


@cache
def on_one_rank(
    algorithm: str, case: str
) -> tuple[dict[str, Tensor], list[RoundRecord], list[int]]:
    return trained(config(algorithm, case))


@pytest.mark.parametrize("case", ["all", "some", "fewer than ranks"])
@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg"])
@pytest.mark.parametrize("ranks", RANKS)
def test_the_number_of_ranks_changes_nothing(ranks: int, algorithm: str, case: str) -> None:
    state, records, sizes = on_one_rank(algorithm, case)
    assert min(sizes) < 64 < max(sizes)
    for other, rounds, _ in on_ranks(ranks, trained, config(algorithm, case)):
        assert distance(other, state) < 1e-10
        for mine, expected in zip(rounds, records, strict=True):
            assert mine.train_loss == pytest.approx(expected.train_loss, rel=1e-10)
            assert mine.test_loss == pytest.approx(expected.test_loss, rel=1e-10)
            assert mine.clients == expected.clients


@pytest.mark.parametrize("case", ["all", "some"])
@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_stacking_changes_nothing(ranks: int, algorithm: str, case: str) -> None:
    """Batches of unequal sizes are padded; local steps run three clients at a time."""
    state, records, _ = on_one_rank(algorithm, case)
    stacked = CohortConfig(mode=CohortMode.stacked, max_stacked=3)
    options = config(algorithm, case, cohort=stacked)
    for other, rounds, _ in on_ranks(ranks, trained, options):
        assert distance(other, state) < 1e-10
        for mine, expected in zip(rounds, records, strict=True):
            assert mine.train_loss == pytest.approx(expected.train_loss, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["all", "some"])
@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg"])
def test_float32_reaches_the_same_accuracy_on_any_number_of_ranks(
    algorithm: str, case: str
) -> None:
    """Unequal clients, all or three in a round; 2,000 test samples."""
    options = config(
        algorithm,
        case,
        rounds=50,
        local_steps=2,
        eval_every=50,
        batch_size=32,
        precision=PrecisionName.float32,
        data=DataConfig(name=DataName.synthetic, samples=10_000, shape=[2, 3, 3]),
    )
    accuracies = [on_ranks(ranks, trained, options)[0][1][-1].test_accuracy for ranks in RANKS]
    found = [accuracy for accuracy in accuracies if accuracy is not None]
    assert len(found) == 4
    assert max(found) - min(found) <= 0.003


SPREADS = {
    "all on one": [[0, 1, 2, 3]],
    "two and two": [[2, 0], [1, 3]],
    "one and three": [[3], [0, 1, 2]],
    "a rank without": [[0, 1, 3], [2], []],
}


def round_of_gradients(case: str, mode: CohortMode, spread: list[list[int]]) -> dict[str, Tensor]:
    """Returns what a round of one step with learning rate 1 subtracts: sum_k p_k g_k."""
    model = fedtan_hpc.convert_batchnorm(networks.network(case))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    p, batches = networks.weights(4), networks.batches(case, 4)
    clients = [Client(k, p[k], Samples(*batches[k])) for k in spread[process_group.rank()]]
    dummy = Samples(batches[0][0][:1], batches[0][1][:1])
    options = Config(local_steps=1, batch_size=99, cohort=CohortConfig(mode=mode))
    cohort = host(options, model, dummy)
    runner = cohort.runner.choose(len(clients), plan(options, 1))
    is_stacked = len(clients) > 1 and mode is CohortMode.stacked
    assert type(runner) is (StackedRunner if is_stacked else LockstepRunner)
    train_round(cohort, clients, RoundContext(1, 1.0, plan(options, 1)))
    return {name: before[name] - value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("mode", [CohortMode.stacked, CohortMode.sequential])
@pytest.mark.parametrize("case", networks.CASES)
def test_a_round_of_one_step_follows_the_pooled_gradient(
    case: str, mode: CohortMode, spread: str
) -> None:
    p, batches = networks.weights(4), networks.batches(case, 4)
    expected = pooled.pooled_gradient(networks.network(case), batches, p)
    found = on_ranks(len(SPREADS[spread]), round_of_gradients, case, mode, SPREADS[spread])
    for measured in found:
        assert pooled.worst_relative_error(measured, expected) < 1e-10


def of_single_samples(mode: CohortMode, spread: list[list[int]]) -> dict[str, Tensor]:
    """Returns what two steps with learning rate 0.1 subtract, with one sample of each client."""
    model = fedtan_hpc.convert_batchnorm(networks.network("1d"))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    batches = [(x[:1], y[:1]) for x, y in networks.batches("1d", 4)]
    clients = [
        Client(k, p, Samples(*batches[k]))
        for k, p in enumerate(networks.weights(4))
        if k in spread[process_group.rank()]
    ]
    centralised = AlgorithmConfig(name=AlgorithmName.centralised)
    cohort_config = CohortConfig(mode=mode)
    options = Config(algorithm=centralised, local_steps=2, batch_size=1, cohort=cohort_config)
    cohort = host(options, model, Samples(*batches[0]))
    train_round(cohort, clients, RoundContext(1, 0.1, plan(options, 1)))
    return {name: before[name] - value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("mode", [CohortMode.stacked, CohortMode.sequential])
def test_batches_of_one_sample_are_exact_where_all_steps_are_synchronised(
    mode: CohortMode, spread: str
) -> None:
    """The steps are those of SGD on the weighted samples of all clients, with plain BN."""
    model, p = networks.network("1d"), networks.weights(4)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    batches = [(x[:1], y[:1]) for x, y in networks.batches("1d", 4)]
    for _ in range(2):
        gradient = pooled.pooled_gradient(model, batches, p)
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.sub_(gradient[name], alpha=0.1)
    expected = {name: before[name] - value.detach() for name, value in model.named_parameters()}
    for measured in on_ranks(len(SPREADS[spread]), of_single_samples, mode, SPREADS[spread]):
        assert pooled.worst_relative_error(measured, expected) < 1e-10


def two_rounds(case: str, mode: CohortMode, extracts_early: bool = False) -> dict[str, Tensor]:
    """Returns the model after two rounds of three steps with momentum, two stacked at a time.

    ``extracts_early``: only synchronised steps are stacked, as on a GPU in sequential mode.
    """
    model = fedtan_hpc.convert_batchnorm(networks.network(case))
    options = Config(
        local_steps=3,
        batch_size=99,
        optimizer=OptimizerConfig(momentum=0.9, weight_decay=1e-2),
        cohort=CohortConfig(mode=mode, max_stacked=2),
    )
    p, batches = networks.weights(4), networks.batches(case, 4)
    clients = [Client(k, p[k], Samples(*batches[k])) for k in range(4)]
    dummy = Samples(batches[0][0][:1], batches[0][1][:1])
    cohort = host(options, model, dummy)
    if extracts_early:
        runners = cohort.runner
        runners.stacked = StackedRunner(runners.models, all_steps=False, max_stacked=2)
    for number in (1, 2):
        train_round(cohort, clients, RoundContext(number, 0.1, plan(options, number)))
    return dict(model.state_dict())


@pytest.mark.parametrize("case", networks.CASES)
def test_stacked_rounds_are_those_of_one_client_after_another(case: str) -> None:
    """Also if clients are extracted from the stack after the synchronised step."""
    expected = two_rounds(case, CohortMode.sequential)
    assert distance(two_rounds(case, CohortMode.stacked), expected) < 1e-10
    assert distance(two_rounds(case, CohortMode.sequential, extracts_early=True), expected) < 1e-10


def messages_of(options: Config) -> list[int]:
    return [record.comm_messages for record in trained(options)[1]]


@pytest.mark.parametrize(("clients", "ranks"), [(5, 2), (1, 3)])
def test_messages_do_not_grow_with_the_clients_of_a_rank(clients: int, ranks: int) -> None:
    options = config("fedtan", "all", clients=clients, rounds=2)
    for messages in on_ranks(ranks, messages_of, options):
        assert messages == [7, 7]  # two BN layers in float64, two there and one back; the average


def samples_seen(options: Config) -> int:
    """Returns the samples in this rank's forward passes of training."""
    trainer = prepare(options, CPU)
    seen = 0

    def count(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal seen
        seen += len(inputs[0]) if module.training else 0

    trainer.model.register_forward_pre_hook(count)
    trainer.train([])
    return seen


@pytest.mark.parametrize(("algorithm", "idle"), [("fedtan", 1), ("fedavg", 0)])
def test_a_rank_without_a_client_costs_a_sample_at_most(algorithm: str, idle: int) -> None:
    options = config(algorithm, "all", clients=1, rounds=1, batch_size=8)
    assert on_ranks(3, samples_seen, options) == [24, idle, idle]


def loaded_clients(options: Config) -> int:
    trainer = prepare(options, CPU)
    trainer.train([])
    return len(trainer.store._loaded)


def test_a_rank_keeps_the_samples_of_a_rounds_clients_only() -> None:
    options = config("fedavg", "some", clients=60, rounds=8, batch_size=4)
    for loaded in on_ranks(2, loaded_clients, options):
        assert 1 <= loaded <= 4


def counters(options: Config) -> list[int]:
    trainer = prepare(options, CPU)
    trainer.train([])
    return [int(value) for name, value in trainer.model.named_buffers() if "num_batches" in name]


@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg"])
def test_counters_of_batches_are_those_of_one_client_everywhere(algorithm: str) -> None:
    options = config(algorithm, "fewer than ranks")
    for found in on_ranks(4, counters, options):
        assert found == [15, 15]


def convolutional(tmp_path: str) -> float:
    options = config(
        "fedtan",
        "all",
        clients=3,
        rounds=1,
        local_steps=2,
        batch_size=8,
        data=DataConfig(name=DataName.synthetic, samples=120, shape=[3, 8, 8]),
        model=ModelConfig(name=ModelName.resnet20),
        run_dir=tmp_path,
    )
    return fedtan_hpc.run(options).test_loss


def test_a_deep_network_trains_alike_on_one_and_two_ranks(tmp_path: Path) -> None:
    one = convolutional(str(tmp_path / "one"))
    for loss in on_ranks(2, convolutional, str(tmp_path / "two")):
        assert loss == pytest.approx(one, rel=1e-9)
    assert process_group.world_size() == 1


@pytest.mark.parametrize("network", ["with_auxiliary", "two_statistics", "weight_normed"])
@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg", "fedbn"])
def test_unusual_networks_train_alike_in_all_ways(algorithm: str, network: str) -> None:
    """One client after another, in lock-step, stacked and on two ranks."""
    model = ModelConfig(source=ModelSource.import_, target=f"tests.helpers.networks:{network}")
    options = config(algorithm, "some", model=model, rounds=2, eval_train_samples=200)
    state, records, _ = trained(options)
    stacked = replace(options, cohort=CohortConfig(mode=CohortMode.stacked, max_stacked=2))
    for ranks, other_options in ((2, options), (1, stacked), (2, stacked)):
        for other, rounds, _ in on_ranks(ranks, trained, other_options):
            assert distance(other, state) < 1e-10
            for mine, expected in zip(rounds, records, strict=True):
                for figure in ("train_loss", "test_loss", "test_accuracy", "pooled_train_loss"):
                    assert getattr(mine, figure) == pytest.approx(getattr(expected, figure))


def test_an_auxiliary_loss_counts() -> None:
    target = "tests.helpers.networks:with_auxiliary"
    model = ModelConfig(source=ModelSource.import_, target=target)
    options = config("fedtan", "some", model=model, rounds=2)
    both, alone = (
        trained(replace(options, model=replace(model, output=name)))[0] for name in (None, "logits")
    )
    assert not torch.equal(alone["auxiliary.0.weight"], both["auxiliary.0.weight"])
    assert not torch.equal(alone["body.1.weight"], both["body.1.weight"])


@pytest.mark.parametrize("network", ["with_dropout", "drawing"])
@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg"])
def test_what_networks_draw_does_not_depend_on_the_ranks(algorithm: str, network: str) -> None:
    """It does not depend on the random state of the process either."""
    model = ModelConfig(source=ModelSource.import_, target=f"tests.helpers.networks:{network}")
    options = config(algorithm, "some", model=model, rounds=3)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    np.random.randn()  # another one is kept
    state, records, _ = trained(options)
    for ranks in (1, 2):
        for other, rounds, _ in on_ranks(ranks, trained, options):
            assert distance(other, state) < 1e-10
            assert rounds[-1].train_loss == pytest.approx(records[-1].train_loss, rel=1e-10)
    without, _, _ = trained(config(algorithm, "some", rounds=3))
    last, of_without = list(state.values())[-1], list(without.values())[-1]
    assert (last - of_without).norm() > 1e-2 * of_without.norm()
