"""Clients on several ranks each: the same rounds for any number of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedtan_hpc.config.enums import (
    AlgorithmName,
    CohortMode,
    LoadingName,
    ModelName,
    ModelSource,
    NormName,
    PartitionName,
    PrecisionName,
    SamplingName,
    ServerOptimizerName,
)
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    ClientConfig,
    CohortConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PartitionConfig,
    ProbeConfig,
    ServerConfig,
)
from fedtan_hpc.config.validate import check
from fedtan_hpc.training import client_gradients
from tests.helpers import commands, jobs
from tests.helpers.ranks import RankFailed, on_ranks
from tests.helpers.rounds import distance

METHODS = ["fedtan", "fedavg", "centralised", "fedbn", "fedavg_gn", "fixbn", "silobn", "singleset"]


def config(name: str, folder: Path, **options: Any) -> Config:
    """Five unequal clients, some smaller than a batch, of which three take part in a round."""
    defaults: dict[str, Any] = {
        "algorithm": AlgorithmConfig(name=AlgorithmName(name)),
        "data": DataConfig(train_samples=300, test_samples=50),
        "model": ModelConfig(name=ModelName.mlp),
        "partition": PartitionConfig(name=PartitionName.dirichlet, alpha=0.2),
        "optimizer": OptimizerConfig(lr=0.05, momentum=0.9, weight_decay=1e-4, clip_norm=2.0),
        "precision": PrecisionName.float64,
        "clients": 5,
        "clients_per_round": None if name == "centralised" else 3,
        "rounds": 5,
        "local_steps": 3,
        "batch_size": 30,
        "eval_every": 1,
        "run_dir": str(folder),
    }
    return Config(**{**defaults, **options})


FIGURES = ("loss", "accuracy", "clients_")
Result = tuple[dict[str, Any], list[float]]


def result(options: Config) -> Result:
    """The model and all figures of a run's rounds."""
    jobs.run(options)
    folder = Path(str(options.run_dir))
    state = jobs.state_of(folder)
    if (folder / "clients.pt").exists():
        clients = torch.load(folder / "clients.pt")
        state |= {f"{c}.{name}": v for c, kept in clients.items() for name, v in kept.items()}
    figures = [
        float(value)
        for line in jobs.rounds_of(folder)
        for name, value in line.items()
        if value is not None and any(part in name for part in FIGURES)
    ]
    return state, figures


def same(folder: Path, name: str, **options: Any) -> None:
    wanted: Result | None = None
    for ranks, each in ((1, 1), (2, 2), (4, 2), (4, 4)):
        made = config(name, folder / f"{ranks}-{each}", ranks_per_client=each, **options)
        found = on_ranks(ranks, result, made)[0]
        wanted = wanted or found
        assert distance(found[0], wanted[0]) < 1e-10
        assert found[1] == pytest.approx(wanted[1], abs=1e-10)


@pytest.mark.parametrize("algorithm", METHODS)
def test_any_number_of_ranks_gives_the_same_rounds(tmp_path: Path, algorithm: str) -> None:
    same(tmp_path, algorithm)


def volumes() -> nn.Module:
    """A network with BN3d, and one with BN1d of sequences."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 1)),
        nn.Conv3d(1, 3, 3, padding=1),
        nn.BatchNorm3d(3),
        nn.ReLU(),
        nn.Flatten(2),
        nn.BatchNorm1d(3),
        nn.Flatten(),
        nn.Linear(192, 10),
    )


def test_states_are_lent_for_a_round_only(tmp_path: Path) -> None:
    """An evaluation may give a client to a rank that has helped to train it."""
    same(tmp_path, "fedbn", clients=4, clients_per_round=None)


@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg"])
@pytest.mark.parametrize("network", ["cnn", "volumes"])
def test_layers_of_any_dimension(tmp_path: Path, network: str, algorithm: str) -> None:
    model = ModelConfig(name=ModelName.cnn)
    if network == "volumes":
        target = "tests.training.test_client_ranks:volumes"
        model = ModelConfig(source=ModelSource.import_, target=target)
    same(tmp_path, algorithm, model=model)


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": AlgorithmConfig(synchronised_steps=2, synchronise_every=2)},
        {"algorithm": AlgorithmConfig(layers=["5"])},
        {"local_epochs": 1, "local_steps": Config().local_steps},
        {"sampling": SamplingName.replacement},
        {"client": ClientConfig(proximal_mu=0.1)},
        {"model": ModelConfig(name=ModelName.mlp, norm=NormName.bn, freeze=["1", "2"])},
        {"server": ServerConfig(optimizer=ServerOptimizerName.adam)},
    ],
    ids=["rounds", "layers", "epochs", "replacement", "proximal", "frozen", "server"],
)
def test_options_of_local_steps(tmp_path: Path, options: dict[str, Any]) -> None:
    same(tmp_path, "fedtan", **options)


@pytest.mark.parametrize("loading", ["device", "stream"])
def test_images_are_changed_and_read_as_on_one_rank(tmp_path: Path, loading: str) -> None:
    data = DataConfig(
        train_samples=300,
        test_samples=50,
        flip=True,
        crop_padding=1,
        loading=LoadingName(loading),
        workers=0 if loading == "stream" else None,
    )
    same(tmp_path, "fedavg", data=data, model=ModelConfig(name=ModelName.cnn))


def overlapped(options: Config) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_gradients, "_BUCKET_BYTES", 1000)
        return result(options)


@pytest.mark.parametrize("algorithm", ["fedtan", "fedbn"])
def test_gradients_that_are_summed_during_the_backward_pass(tmp_path: Path, algorithm: str) -> None:
    model = ModelConfig(name=ModelName.cnn)
    made = [config(algorithm, tmp_path / f"{n}", model=model, ranks_per_client=n) for n in (1, 2)]
    wanted, found = on_ranks(1, result, made[0])[0], on_ranks(4, overlapped, made[1])[0]
    assert distance(found[0], wanted[0]) < 1e-10
    assert found[1] == pytest.approx(wanted[1], abs=1e-10)
    after = config(algorithm, tmp_path / "after", model=model, ranks_per_client=2)
    on_ranks(4, jobs.run, after)
    packed, many = (jobs.rounds_of(Path(str(each.run_dir)))[0] for each in (after, made[1]))
    assert many["client_messages"] > packed["client_messages"] + 3


def test_a_batch_smaller_than_the_group_leaves_ranks_without_a_sample(tmp_path: Path) -> None:
    same(tmp_path, "fedtan", batch_size=3)


def test_a_run_goes_on_with_another_number_of_ranks_for_a_client(tmp_path: Path) -> None:
    def options(name: str, each: int) -> Config:
        checkpoint = CheckpointConfig(every=2)
        return config("fedbn", tmp_path / name, checkpoint=checkpoint, ranks_per_client=each)

    wanted = on_ranks(1, result, options("whole", 1))[0]
    on_ranks(4, jobs.run_until, options("stopped", 2), 3)
    (tmp_path / "stopped" / "checkpoints" / "round-000003.pt").unlink()  # goes on after round 2
    found = on_ranks(2, result, options("stopped", 2))[0]
    assert distance(found[0], wanted[0]) < 1e-10


def test_messages_of_clients_are_counted_apart(tmp_path: Path) -> None:
    """In float32 two sums a BN layer and one of gradients in each local step."""
    single = PrecisionName.float32
    for each in (1, 2):
        options = config("fedtan", tmp_path / str(each), precision=single, ranks_per_client=each)
        on_ranks(4, jobs.run, options)
    alone, shared = (jobs.rounds_of(tmp_path / name)[0] for name in ("1", "2"))
    layers, steps, clients_of_rank_0 = 2, 3, 2
    assert alone["client_messages"] == alone["client_bytes"] == 0
    assert alone["client_seconds"] == 0.0
    local = (steps - 1) * (2 * layers + 1) + 1  # the synchronised step sends gradients only
    assert shared["client_messages"] == clients_of_rank_0 * local
    assert 0 < shared["client_seconds"] < shared["round_seconds"]
    assert shared["comm_messages"] == alone["comm_messages"]
    assert shared["payload_bytes"] == alone["payload_bytes"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"algorithm": AlgorithmConfig(name=AlgorithmName.fbn)}, "algorithm=fbn: allowed is none"),
        ({"compile": True}, "compile=true: allowed is false with ranks_per_client=2"),
        ({"cohort": CohortConfig(mode=CohortMode.stacked)}, "cohort.mode=stacked: allowed is auto"),
        ({"probe": ProbeConfig(every=3)}, "probe.every=3: allowed is null with ranks_per_client=2"),
        ({"algorithm": AlgorithmConfig(layers="auto")}, "algorithm.layers=auto: allowed is all or"),
        ({"ranks_per_client": 0}, "ranks_per_client=0: allowed is a whole number >= 1"),
    ],
)
def test_what_does_not_go_together_is_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        check(Config(**{"ranks_per_client": 2, **options}))
    assert len(caught.value.mistakes) == 1


def test_ranks_must_be_a_multiple(tmp_path: Path) -> None:
    done = commands.ranks(3, "ranks_per_client=2", "run_dir=run", cwd=tmp_path)
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("fedtan_hpc: ")]
    assert "ranks_per_client=2: allowed is a divisor of the number of ranks, 3; start 2" in line
    assert not (tmp_path / "run").exists()


def failing() -> nn.Module:
    return nn.Sequential(nn.Flatten(), Failing(), nn.Linear(64, 10), nn.BatchNorm1d(10))


class Failing(nn.Module):
    """Fails in a local step of rank 3."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += torch.is_grad_enabled()
        if dist.is_initialized() and dist.get_rank() == 3 and self.calls == 4:
            raise ValueError("a bad sample")
        return x


def test_a_failure_names_client_and_ranks(tmp_path: Path) -> None:
    model = ModelConfig(source=ModelSource.import_, target=f"{__name__}:failing")
    options = config("fedavg", tmp_path / "run", model=model, ranks_per_client=2)
    with pytest.raises(
        RankFailed, match=r"rank 3, round \d, client \d on ranks 2 to 3: ValueError"
    ):
        on_ranks(4, jobs.run, options)
