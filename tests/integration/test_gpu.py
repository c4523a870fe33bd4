"""One GPU gives the results of a CPU, and a round does not wait for the device.

pytest -n 1 -m gpu
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy

import fedtan_hpc
from fedtan_hpc.config.algorithms import plan
from fedtan_hpc.config.enums import CohortMode, PrecisionName
from fedtan_hpc.config.schema import CohortConfig, Config
from fedtan_hpc.job.setup import prepare
from fedtan_hpc.runtime.device import DevicePlacement, tensor_float
from fedtan_hpc.training.local_step import RoundContext
from tests.helpers import commands, networks
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU, distance, iid_config, train_round
from tests.training.test_client_gradients import WAYS, Way, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or not selected by -m gpu"),
]
KIND = "cuda"
ON_GPU = DevicePlacement(torch.device(KIND, 0), "gloo")


def trained(options: Config, place: DevicePlacement) -> dict[str, Tensor]:
    trainer = prepare(options, place)
    trainer.train([])
    return {name: value.cpu() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize(
    "algorithm", ["fedtan", "fedavg", "fixbn", "silobn", "fbn", "hbn", "centralised"]
)
def test_a_gpu_trains_the_model_that_a_cpu_trains(algorithm: str, clients: int) -> None:
    """With one client, and with three stacked clients."""
    options = iid_config(algorithm, clients=clients)
    assert distance(trained(options, ON_GPU), trained(options, CPU)) < 1e-10


@pytest.mark.parametrize(
    ("algorithm", "clients", "ranks_per_client"),
    [("fedtan", 2, 1), ("fedtan", 5, 1), ("fedtan", 3, 2), ("fedavg", 3, 2)],
)
def test_ranks_that_share_a_gpu_train_the_same_model(
    algorithm: str, clients: int, ranks_per_client: int
) -> None:
    options = iid_config(algorithm, clients=clients)
    alone = trained(options, CPU)
    shared = replace(options, ranks_per_client=ranks_per_client)
    for state in on_ranks(2, trained, shared, ON_GPU):
        assert distance(state, alone) < 1e-10


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_ranks_that_share_a_gpu_sum_gradients_during_the_backward_pass(way: Way) -> None:
    check(on_ranks, KIND, way)


def gradients_in_lockstep(device: str) -> list[Tensor]:
    module = fedtan_hpc.convert_batchnorm(networks.network("branches")).to(device)
    replicas = [copy.deepcopy(module) for _ in range(3)]
    batches = [(x.to(device), y.to(device)) for x, y in networks.batches("branches", 3)]
    losses = [
        lambda model=model, x=x, y=y: cross_entropy(model(x), y)
        for model, (x, y) in zip(replicas, batches, strict=True)
    ]
    fedtan_hpc.federated_backward(replicas, losses, networks.weights(3))
    values = [value for replica in replicas for value in replica.parameters()]
    return [value.grad.cpu() for value in values if value.grad is not None]


def test_clients_in_lockstep_have_the_gradients_of_a_cpu() -> None:
    """Each client's thread runs its backward pass: a common thread would wait for itself."""
    for found, expected in zip(*map(gradients_in_lockstep, ("cuda", "cpu")), strict=True):
        assert float((found - expected).norm()) <= 1e-10 * float(expected.norm())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg", "fixbn"])
def test_compiled_steps_are_replayed_as_graphs(algorithm: str) -> None:
    torch._dynamo.utils.counters.clear()
    options = iid_config(algorithm, clients=1, compile=True)
    assert (
        distance(trained(options, ON_GPU), trained(iid_config(algorithm, clients=1), CPU)) < 1e-10
    )
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_bfloat16_trains_close_to_float32() -> None:
    states = [
        trained(iid_config(precision=precision, rounds=1), ON_GPU)
        for precision in (PrecisionName.bfloat16, PrecisionName.float32)
    ]
    assert 1e-6 < distance(*states) < 0.3


@pytest.mark.timeout(600)
@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg"])
def test_a_job_over_nccl_and_a_compiled_one_end_where_a_cpu_does(
    algorithm: str, tmp_path: Path
) -> None:
    losses = []
    words = ["clients=1", "partition=iid", "rounds=3", "precision=float64"]
    ways = {"cpu": ["device=cpu"], "nccl": ["device=cuda"], "compiled": ["compile=true"]}
    for name, more in ways.items():
        start = ("torchrun", "--nproc-per-node", "1", "-m", "fedtan_hpc", f"algorithm={algorithm}")
        done = commands.run(*start, f"run_dir={name}", *words, *more, cwd=tmp_path, seconds=300)
        assert done.returncode == 0, done.stderr
        assert "compile=true" not in done.stderr
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["backend"] == ("gloo" if name == "cpu" else "nccl")
        losses.append(summary["test_loss"])
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-9)


@pytest.mark.parametrize(("ranks", "backend"), [("1", "nccl"), ("2", "gloo")])
def test_a_step_is_timed_against_torchs_own_data_parallelism(
    ranks: str, backend: str, tmp_path: Path
) -> None:
    """Over NCCL, and over gloo where ranks share the GPU, with SyncBatchNorm's collectives."""
    tool = commands.tool("bench_round.py")
    words = ("device=cuda", "model=cnn", "local_steps=1", "repeats=2", f"backends=[{backend}]")
    done = commands.run("torchrun", "--nproc-per-node", ranks, tool, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    names = ["plain", "convolutions", "local", "fedavg", "fedtan", "ddp"]
    assert [row["variant"] for row in rows] == names
    assert all(row["round_ms"] > 0 for row in rows)


@pytest.mark.parametrize(("algorithm", "reads"), [("fedtan", 2), ("fedavg", 1)])
@pytest.mark.parametrize("mode", [CohortMode.auto, CohortMode.stacked])
def test_a_round_waits_for_the_device_at_its_checks_alone(
    algorithm: str, reads: int, mode: CohortMode
) -> None:
    """FedTAN reads all headers of the statistics at once; each method reads the average's."""
    clients = 3 if mode is CohortMode.stacked else 1
    options = iid_config(algorithm, clients=clients, local_steps=5, cohort=CohortConfig(mode=mode))
    trainer = prepare(options, ON_GPU)
    hosted = trainer._hosted(trainer._participants(1))
    for number in (1, 2, 3):
        context = RoundContext(number, 0.05, plan(options, number))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train_round(trainer.cohort, hosted, context)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in caught if "synchronizing" in str(each.message)]
    assert len(waits) <= reads, waits


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="this GPU has no TensorFloat-32",
)
def test_convolutions_have_24_bits_without_tf32() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(8, 64, 16, 16), torch.randn(64, 64, 3, 3)
    exact = conv2d(x.double(), weight.double())
    errors = {}
    for allowed in (False, True):
        with tensor_float(allowed):
            found = conv2d(x.cuda(), weight.cuda()).cpu().double()
        errors[allowed] = float((found - exact).norm() / exact.norm())
    assert errors[False] < 1e-5
    assert 1e-4 < errors[True] < 1e-2
