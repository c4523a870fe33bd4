"""The job: against a re-statement in one process, its files, its messages, its failures."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fedtan_hpc.config.enums import AlgorithmName, DataName, ModelName, PartitionName, PrecisionName
from fedtan_hpc.config.errors import ConfigError, RunError
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    Config,
    DataConfig,
    LrScheduleConfig,
    ModelConfig,
    OptimizerConfig,
    PartitionConfig,
)
from fedtan_hpc.data import datasets, partition
from fedtan_hpc.data.batching import BatchSampler, Samples
from fedtan_hpc.distributed import consistency, process_group
from fedtan_hpc.evaluation.metrics import Evaluation, evaluate
from fedtan_hpc.job.setup import prepare
from fedtan_hpc.models import factory, small_networks
from fedtan_hpc.runtime import launcher_env
from tests.helpers import simulation
from tests.helpers.jobs import run_here, small
from tests.helpers.ranks import RankFailed, on_ranks
from tests.helpers.rounds import CPU

FEDTAN = AlgorithmConfig(name=AlgorithmName.fedtan)
FEDAVG = AlgorithmConfig(name=AlgorithmName.fedavg)


def float64(samples: Samples) -> Samples:
    return Samples(samples.inputs.double(), samples.labels)


def trained_on_ranks(config: Config) -> tuple[dict[str, Tensor], list[float]]:
    """Global model and training losses of the product, in float64."""
    trainer = prepare(config, CPU)
    records = trainer.train([])
    return dict(trainer.model.state_dict()), [record.train_loss for record in records]


def simulated(config: Config) -> tuple[dict[str, Tensor], list[float]]:
    """The same by ``simulation`` in this process."""
    dataset = datasets.load(config.data, config.seed)
    labels = dataset.labels_N[dataset.train]
    parts = partition.split(labels, config.clients, config.partition, config.seed)
    p = [len(part) / len(labels) for part in parts]
    clients = [float64(dataset.take(dataset.train[part])) for part in parts]
    model = factory.build(config.model, dataset.shape, dataset.classes, config.seed).double()
    state, losses = dict(model.state_dict()), []
    for number in range(1, config.rounds + 1):
        rate = config.optimizer.lr * (0.5 if number > 2 else 1)
        states = [simulation.copy(_floats(state)) for _ in clients]
        sampler = BatchSampler(config.batch_size, config.local_steps, config.seed)
        orders = [next(sampler.draw(len(c), k, number)) for k, c in enumerate(clients)]
        means = [0.0] * len(clients)
        for step in range(config.local_steps):
            chosen = [c[order[step]] for c, order in zip(clients, orders, strict=True)]
            synchronised = step == 0 and config.algorithm.name is AlgorithmName.fedtan
            batches = [(batch.inputs, batch.labels) for batch in chosen]
            now = simulation.local_step(states, batches, p, synchronised, rate)
            means = [m + loss / config.local_steps for m, loss in zip(means, now, strict=True)]
        state = simulation.average(states, p)
        losses.append(sum(p_k * m for p_k, m in zip(p, means, strict=True)))
    return state, losses


def _floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if value.is_floating_point()}


@pytest.mark.parametrize("algorithm", [FEDTAN, FEDAVG], ids=lambda a: str(a.name))
@pytest.mark.parametrize(("clients", "ranks"), [(1, 1), (2, 2), (3, 3), (3, 1), (4, 2), (2, 3)])
def test_ranks_equal_one_process_that_simulates_the_clients(
    clients: int, ranks: int, algorithm: AlgorithmConfig
) -> None:
    config = small(clients, algorithm=algorithm, precision=PrecisionName.float64)
    expected, losses = simulated(config)
    for state, train_losses in on_ranks(ranks, trained_on_ranks, config):
        for name, value in expected.items():
            assert float((state[name] - value).norm() / value.norm().clamp_min(1e-6)) < 1e-10, name
        assert train_losses == pytest.approx(losses, rel=1e-10)


def test_one_step_of_fedtan_is_centralised_sgd() -> None:
    """With E = 1 and whole shares as batches it is gradient descent on the pooled data."""
    config = small(
        3,
        rounds=2,
        local_steps=1,
        batch_size=2000,
        lr_schedule=LrScheduleConfig(),
        precision=PrecisionName.float64,
    )
    dataset = datasets.load(config.data, config.seed)
    samples = float64(dataset.take(dataset.train))
    model = factory.build(config.model, dataset.shape, dataset.classes, config.seed).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optimizer.lr)
    for _ in range(2):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(samples.inputs), samples.labels)
        loss.backward()
        optimizer.step()
    state, _ = on_ranks(3, trained_on_ranks, config)[0]
    for name, value in _floats(dict(model.state_dict())).items():
        assert float((state[name] - value).norm() / value.norm().clamp_min(1e-6)) < 1e-9, name


def test_run_writes_what_it_promises(tmp_path: Path) -> None:
    config = small(2)
    summaries = on_ranks(2, run_here, config, str(tmp_path))
    assert summaries[0].test_accuracy == summaries[1].test_accuracy
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert set(lines[0]) == {
        "round",
        "train_loss",
        "test_loss",
        "test_accuracy",
        "pooled_train_loss",
        "clients_judged",
        "clients_test_accuracy_mean",
        "clients_test_accuracy_spread",
        "clients_own_mix_accuracy_mean",
        "clients_own_mix_accuracy_spread",
        "learning_rate",
        "round_seconds",
        "comm_messages",
        "comm_bytes",
        "payload_messages",
        "payload_bytes",
        "clients",
        "statistics_seconds",
        "average_seconds",
        "client_messages",
        "client_bytes",
        "client_seconds",
        "evaluation_seconds",
    }
    assert [line["test_accuracy"] is None for line in lines] == [True, False, False]
    assert [line["learning_rate"] for line in lines] == [0.1, 0.1, 0.05]
    assert all(line["clients"] == 2 and line["round_seconds"] > 0 for line in lines)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test_accuracy"] == lines[-1]["test_accuracy"]
    assert summary["world_size"] == 2
    assert summary["backend"] == "gloo"
    assert summary["parameters"] == 17_610
    assert {"algorithm", "rounds", "test_loss", "total_seconds", "median_round_seconds"} < set(
        summary
    )
    assert set(summary["versions"]) == {"fedtan_hpc", "python", "torch"}
    assert "dirichlet" in (tmp_path / "config.yaml").read_text()
    assert list(tmp_path.glob("events.*"))
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    model = small_networks.mlp(64, 10)
    model.load_state_dict(state)
    dataset = datasets.load(DataConfig(), seed=0)
    judged = evaluate(model, dataset.take(dataset.test).evaluation_batches())
    assert judged.accuracy == pytest.approx(summary["test_accuracy"], abs=1e-12)


def test_equal_runs_are_equal_to_the_bit(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        on_ranks(2, run_here, small(2), str(tmp_path / folder))
    a, b = (torch.load(tmp_path / folder / "model.pt", weights_only=True) for folder in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def images(algorithm: AlgorithmConfig) -> Config:
    """One round of ResNet-20 on few small synthetic images."""
    return Config(
        algorithm=algorithm,
        data=DataConfig(name=DataName.synthetic, samples=100, shape=[3, 8, 8]),
        model=ModelConfig(name=ModelName.resnet20),
        partition=PartitionConfig(name=PartitionName.iid),
        clients=2,
        rounds=1,
        local_steps=2,
        batch_size=4,
    )


@pytest.mark.parametrize(("algorithm", "messages"), [(FEDTAN, 39), (FEDAVG, 1)])
def test_messages_of_a_round_of_resnet20(
    algorithm: AlgorithmConfig, messages: int, tmp_path: Path
) -> None:
    on_ranks(2, run_here, images(algorithm), str(tmp_path))
    line = json.loads((tmp_path / "rounds.jsonl").read_text())
    assert line["comm_messages"] == messages
    average = 4 * (269_722 + 2 * 688 + 19 + 4)  # values, running statistics, counters, header
    statistics = 8 * (19 * (4 + 4) + (2 + 2) * 688)  # headers, moments and their derivatives
    assert line["comm_bytes"] == average + (statistics if messages > 1 else 0)


def test_a_single_process_sends_nothing(tmp_path: Path) -> None:
    summary = run_here(small(1), str(tmp_path))
    assert summary.backend == "none"
    assert json.loads((tmp_path / "rounds.jsonl").read_text().splitlines()[0])["comm_messages"] == 0


def failure_of(config: Config, folder: str) -> str:
    with pytest.raises(RunError) as caught:
        run_here(config, folder)
    assert caught.value.on_all_ranks
    return str(caught.value)


def test_a_loss_that_is_not_finite_stops_every_rank_by_name(tmp_path: Path) -> None:
    config = small(2, algorithm=FEDAVG, optimizer=OptimizerConfig(lr=1e30))
    for message in on_ranks(2, failure_of, config, str(tmp_path)):
        assert "round 1" in message
        assert "clients [0, 1]" in message


def test_a_last_step_that_is_not_finite_is_no_result(tmp_path: Path) -> None:
    config = small(2, rounds=1, local_steps=1, optimizer=OptimizerConfig(lr=1e30))
    for message in on_ranks(2, failure_of, config, str(tmp_path)):
        assert message.startswith("round 1: the loss of the averaged model on the test set is not")
    assert not (tmp_path / "summary.json").exists()


def spoil_one_client(config: Config) -> str:
    trainer = prepare(config, CPU)
    if process_group.rank() == 1:
        samples = trainer.store.host({1: 1.0})[0].samples
        assert isinstance(samples, Samples)
        samples.inputs.fill_(torch.nan)
    with pytest.raises(RunError) as caught:
        trainer.train([])
    return str(caught.value)


@pytest.mark.parametrize("algorithm", [FEDTAN, FEDAVG], ids=lambda a: str(a.name))
def test_the_client_with_the_bad_loss_is_named(algorithm: AlgorithmConfig) -> None:
    """Under FedTAN all losses are bad, and the samples tell whose fault it is."""
    for message in on_ranks(3, spoil_one_client, small(3, algorithm=algorithm)):
        assert "round 1" in message
        assert "client 1 " in message


def part_ways(config: Config) -> str:
    """Rank 1 changes its model behind the trainer's back after the average."""
    trainer = prepare(config, CPU)
    check = consistency.ranks_that_differ

    def sabotaged(model: torch.nn.Module) -> list[int]:
        if process_group.rank() == 1:
            next(model.parameters()).data.view(-1)[0] += 1e-6
        return check(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consistency, "ranks_that_differ", sabotaged)
        with pytest.raises(RunError) as caught:
            trainer.train([])
    return str(caught.value)


def test_models_that_differ_stop_every_rank() -> None:
    for message in on_ranks(3, part_ways, small(3, check_every=1)):
        assert "round 1" in message
        assert "[1]" in message


def evaluated(total: int) -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(total, 1, 8, 8, generator=generator).double()
    labels = torch.randint(0, 10, (total,), generator=generator)
    model = factory.build(ModelConfig(), (1, 8, 8), 10, seed=0).double()
    share = slice(process_group.rank(), None, process_group.world_size())
    return evaluate(model, Samples(inputs[share], labels[share]).evaluation_batches())


@pytest.mark.parametrize("total", [2, 1030])
def test_evaluation_does_not_depend_on_the_ranks(total: int) -> None:
    alone = evaluated(total)
    for ranks in (2, 3):
        for shared in on_ranks(ranks, evaluated, total):
            assert shared.accuracy == alone.accuracy
            assert shared.loss == pytest.approx(alone.loss, rel=1e-12)


def fail_on_one(seconds: float) -> None:
    if dist.get_rank() == 1:
        raise ValueError("a fault of rank 1's own")
    time.sleep(seconds)


def test_the_harness_shows_the_traceback_of_the_rank_that_failed() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1:") as caught:
        on_ranks(2, fail_on_one, 30.0)
    assert "a fault of rank 1's own" in str(caught.value)
    assert time.monotonic() - start < 15


def fetching(fails: bool) -> tuple[int, str]:
    """How often this rank looked for files, and what its job said; local rank 0 looks."""
    from fedtan_hpc.job import run

    looked = []

    def fetch(config: DataConfig) -> None:
        looked.append(config)
        if fails:
            raise ConfigError("data.root=null: allowed is a folder with the files; put them there")

    info = launcher_env.info_of_existing_group(dist.get_rank(), dist.get_world_size(), {})
    try:
        run._agreed(info.local_rank == 0, partial(fetch, DataConfig()))
    except ConfigError as error:
        return len(looked), str(error)
    return len(looked), ""


def test_one_rank_of_a_node_fetches_files_and_all_learn_what_is_wrong() -> None:
    assert on_ranks(3, fetching, False) == [(1, ""), (0, ""), (0, "")]
    first, *others = on_ranks(3, fetching, True)
    assert first == (1, "data.root=null: allowed is a folder with the files; put them there")
    assert others == [(0, first[1])] * 2
