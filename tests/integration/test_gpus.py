"""Several GPUs, one NCCL rank on each: the identity, sub-groups, the authors' round, a job.

pytest -n 1 -m gpu
"""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedtan_hpc
from tests.helpers import commands, networks, pooled
from tests.helpers.ranks import on_gpus
from tests.integration import test_parity as parity
from tests.training.test_client_gradients import WAYS, Way, check

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
several_gpus = pytest.mark.skipif(
    GPUS < 2, reason=f"needs two GPUs; there are {GPUS}, or no -m gpu"
)
pytestmark = [pytest.mark.gpu, several_gpus, pytest.mark.timeout(300)]
KIND = "cuda"


def place() -> torch.device:
    return torch.device(KIND, dist.get_rank()) if KIND == "cuda" else torch.device(KIND)


def client_gradients(case: str, members: list[list[int]]) -> tuple[int, dict[str, Tensor]]:
    """This rank's group, and sum_k p_k g_k over its ranks, which are its clients."""
    groups = [dist.new_group(ranks) for ranks in members]
    number = next(n for n, ranks in enumerate(members) if dist.get_rank() in ranks)
    group, clients = groups[number], len(members[number])
    client = members[number].index(dist.get_rank())
    p = networks.weights(clients)[client]
    x, y = (value.to(place()) for value in networks.batches(case, clients)[client])
    module = fedtan_hpc.convert_batchnorm(networks.network(case)).to(place())
    with fedtan_hpc.federated_statistics(module, weight=p, group=group):
        cross_entropy(module(x), y).backward()
    sums = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        total = p * parameter.grad
        dist.all_reduce(total, group=group)
        sums[name] = total.cpu()
    return number, sums


def check_groups(case: str, members: list[list[int]]) -> None:
    for number, measured in on_gpus(GPUS, client_gradients, case, members):
        clients = len(members[number])
        batches, p = networks.batches(case, clients), networks.weights(clients)
        expected = pooled.pooled_gradient(networks.network(case), batches, p)
        assert pooled.worst_relative_error(measured, expected) < 1e-10


@pytest.mark.parametrize("case", networks.CASES)
def test_mean_of_client_gradients_is_the_pooled_gradient(case: str) -> None:
    check_groups(case, [list(range(GPUS))])


def test_groups_of_ranks_have_statistics_of_their_own() -> None:
    half = GPUS // 2
    check_groups("branches", [list(range(half)), list(range(half, GPUS))])


def play_round(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors before and after the recorded round; the ranks share out its clients."""
    job = parity.recorded(name)
    xs, ys, module = parity.recipe(name)
    before = parity.tensors(module)
    clients = range(dist.get_rank(), job["clients"], dist.get_world_size())
    modules = [copy.deepcopy(module).to(place()) for _ in clients]
    weights = [1 / job["clients"]] * len(modules)
    batches = [(xs[k].to(place()), ys[k].to(place())) for k in clients]
    losses = [partial(loss_of, m, x[0], y[0]) for m, (x, y) in zip(modules, batches, strict=True)]
    fedtan_hpc.federated_backward(modules, losses, weights)
    for replica, (x, y) in zip(modules, batches, strict=True):
        parity.new_optimizer(replica, job).step()
        parity.use_the_authors_factor(replica, job["clients"], job["batch_size"])
        parity.take_local_steps(replica, job, x[1:], y[1:])
    fedtan_hpc.average_models(modules, weights)
    return before, {name: value.cpu() for name, value in parity.tensors(modules[0]).items()}


def loss_of(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(module(x), y)


@pytest.mark.parametrize("name", parity.ROUNDS)
def test_every_tensor_is_that_of_the_authors(name: str) -> None:
    ranks = min(GPUS, parity.recorded(name)["clients"])
    (before, after), *others = on_gpus(ranks, play_round, name)
    for key, expected in parity.recorded(name)["tensors"].items():
        step_norm = expected["step_norm"]
        assert float((after[key] - before[key]).norm()) == pytest.approx(step_norm, rel=1e-9), key
        assert float(after[key].sum()) == pytest.approx(expected["sum"], rel=1e-9), key
    for _, other in others:
        assert all(torch.equal(other[key], value) for key, value in after.items())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gradients_of_a_client_are_summed_during_the_backward_pass(way: Way) -> None:
    check(on_gpus, KIND, way)


@pytest.mark.parametrize(
    ("algorithm", "ranks_per_client"),
    [
        ("fedtan", 1),
        ("fedavg", 1),
        ("silobn", 1),
        ("centralised", 1),
        ("fedtan", GPUS),
        ("fedavg", GPUS),
    ],
)
def test_a_job_ends_where_a_single_process_on_a_cpu_does(
    algorithm: str, ranks_per_client: int, tmp_path: Path
) -> None:
    words = [f"algorithm={algorithm}", f"clients={2 * GPUS}", "partition=iid", "rounds=3"]
    words += ["precision=float64", "local_steps=3"]
    launcher = ["torchrun", "--nproc-per-node", str(GPUS), "-m"]
    ways = {"cpu": ["python", "-m"], KIND: launcher}
    extra = {"cpu": [], KIND: [f"ranks_per_client={ranks_per_client}"]}
    losses = {}
    for kind, start in ways.items():
        done = commands.run(
            *start,
            "fedtan_hpc",
            *words,
            *extra[kind],
            f"device={kind}",
            f"run_dir={kind}",
            cwd=tmp_path,
            seconds=250,
        )
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / kind / "summary.json").read_text())
        losses[kind] = summary["test_loss"]
    assert summary["backend"] == "nccl"
    assert losses[KIND] == pytest.approx(losses["cpu"], rel=1e-9)
