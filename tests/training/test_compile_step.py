"""Compiled steps, lower precision and memory formats give equal results or print a message."""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedtan_hpc import convert_batchnorm, federated_backward, federated_statistics
from fedtan_hpc.config.algorithms import plan
from fedtan_hpc.config.enums import ModelName, ModelSource, PrecisionName
from fedtan_hpc.config.schema import (
    Config,
    ModelConfig,
)
from fedtan_hpc.data.batching import Samples
from fedtan_hpc.distributed import process_group
from fedtan_hpc.job.setup import network, prepare
from fedtan_hpc.models import factory
from fedtan_hpc.tasks.objective import Objective
from fedtan_hpc.training import compile_step
from fedtan_hpc.training.compile_step import Trial
from fedtan_hpc.training.local_step import Loss
from tests.helpers import commands
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU, distance, iid_config


def trained(options: Config, backend: str = "aot_eager") -> tuple[dict[str, Tensor], bool]:
    """Returns the global model, and whether compiled steps trained it; needs no C++ compiler."""
    plain = torch.compile
    torch.compile = partial(plain, backend=backend)
    try:
        trainer = prepare(options, CPU)
        trainer.train([])
    finally:
        torch.compile = plain
    compiled = trainer.cohort.loss.compiled is not None
    return dict(trainer.model.state_dict()), compiled


@cache
def eager(algorithm: str, clients: int) -> dict[str, Tensor]:
    return trained(iid_config(algorithm, clients=clients))[0]


@pytest.mark.parametrize("clients", [2, 3])
@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg", "fixbn", "silobn", "centralised"])
def test_compiled_steps_train_the_same_model(algorithm: str, clients: int) -> None:
    """With one client on each rank, and with two clients on one of them."""
    options = iid_config(algorithm, clients=clients, compile=True)
    for state, compiled in on_ranks(2, trained, options):
        assert compiled
        assert distance(state, eager(algorithm, clients)) < 1e-10


def test_a_network_with_several_outputs_is_compiled() -> None:
    target = "tests.helpers.networks:with_auxiliary"
    model = ModelConfig(source=ModelSource.import_, target=target)
    expected, _ = trained(iid_config(model=model, clients=1))
    state, compiled = trained(iid_config(model=model, clients=1, compile=True))
    assert compiled
    assert distance(state, expected) < 1e-10


def failing(options: Config) -> bool:
    backend = "aot_eager" if process_group.rank() == 0 else "no_such_backend"
    return trained(options, backend)[1]


def test_all_go_on_eagerly_if_one_rank_cannot_compile() -> None:
    assert on_ranks(2, failing, iid_config(compile=True)) == [False, False]


def test_it_is_said_why_steps_are_not_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert not trained(iid_config(compile=True), "no_such_backend")[1]
    line = capsys.readouterr().err
    assert line.startswith("compile=true: rank 0 cannot compile (")
    assert "no_such_backend" in line


def test_graphs_that_cannot_be_recorded_are_done_without(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulates CUDA graphs: the third step, which replays them, fails."""
    run_steps, steps = compile_step.Trial.run_steps, []

    def run_or_fail(trial: Trial, loss: Loss) -> None:
        steps.append(loss)
        if len(steps) == 3:
            raise RuntimeError("capture failed")
        run_steps(trial, loss)

    monkeypatch.setattr(compile_step.Trial, "run_steps", run_or_fail)
    monkeypatch.setattr(compile_step, "_modes", lambda device: [compile_step.GRAPHS, "default"])
    options = iid_config(clients=1, compile=True)
    state, compiled = trained(options)
    assert compiled
    assert len(steps) == 4
    assert distance(state, eager("fedtan", 1)) < 1e-10
    line = "compile=true: rank 0 cannot use CUDA graphs (RuntimeError: capture failed)"
    assert capsys.readouterr().err == f"{line}: all ranks compile without them\n"


def test_graphs_are_cut_where_statistics_are_exchanged() -> None:
    exchanges = [getattr(torch.ops.fedtan_hpc, name) for name in torch.ops.fedtan_hpc]
    assert len(exchanges) == 2
    for exchange in exchanges:
        assert torch.Tag.cudagraph_unsafe in exchange.default.tags


def test_a_rehearsal_leaves_no_trace() -> None:
    options = iid_config()
    model = network(options, (1, 8, 8), 10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = Samples(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    state = torch.random.get_rng_state()
    loss = Loss(compiled=Objective().mean_loss)
    plans = plan(iid_config("fixbn"), 1), plan(iid_config("fixbn"), 3)
    Trial(model, batch, plans, synchronised=True).run_steps(loss)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def graphs_before_and_after(options: Config) -> tuple[int, int]:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor], **_: object) -> object:
        graphs.append(graph)
        return graph.forward

    plain = torch.compile
    torch.compile = partial(plain, backend=count)
    try:
        trainer = prepare(options, CPU)
        prepared = len(graphs)
        trainer.train([])
    finally:
        torch.compile = plain
    return prepared, len(graphs)


@pytest.mark.parametrize(
    ("algorithm", "graphs"),
    [("fedtan", 2), ("fedavg", 1), ("fixbn", 2), ("fbn", 1), ("hbn", 1)],
)
def test_all_is_compiled_before_the_first_round(algorithm: str, graphs: int) -> None:
    """One graph for synchronised and one for local steps, or for batch and frozen statistics."""
    found = on_ranks(2, graphs_before_and_after, iid_config(algorithm, compile=True))
    assert found == [(graphs, graphs)] * 2


def one_graph() -> list[int]:
    """Returns the graphs of three synchronised steps; breaks and recompilations add more."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor], **_: object) -> object:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch.manual_seed(0)
    torch.compiler.reset()
    model = convert_batchnorm(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))
    step = torch.compile(Objective().mean_loss, backend=count, fullgraph=True)
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    for _ in range(3):
        with federated_statistics(model, 1 / process_group.world_size()):
            step(model, x, y).backward()
    return graphs


def test_a_synchronised_step_is_one_graph_for_all_rounds() -> None:
    for graphs in on_ranks(2, one_graph):
        assert len(graphs) == 1


def of_format(channels_last: bool) -> tuple[dict[str, Tensor], bool]:
    options = iid_config(precision=PrecisionName.float32, channels_last=channels_last)
    trainer = prepare(options, CPU)
    weight = trainer.model[3].weight  # type: ignore[index]
    assert isinstance(weight, Tensor)
    is_last = weight.is_contiguous(memory_format=torch.channels_last)
    trainer.train([])
    return dict(trainer.model.state_dict()), is_last


def test_channels_last_is_another_order_in_memory_and_no_other_result() -> None:
    (last, is_last), (first, is_first_last) = of_format(True), of_format(False)
    assert is_last
    assert not is_first_last
    assert distance(last, first) < 1e-4


@pytest.mark.parametrize("clients", [1, 3])
def test_bfloat16_trains_close_to_float32_with_statistics_in_full(clients: int) -> None:
    states = {}
    for precision in (PrecisionName.bfloat16, PrecisionName.float32):
        options = iid_config(precision=precision, clients=clients, rounds=1)
        states[precision], _ = trained(options)
    assert all(
        value.dtype is torch.float32
        for value in states[PrecisionName.bfloat16].values()
        if value.is_floating_point()
    )
    assert 1e-6 < distance(*states.values()) < 0.3


def pooled_error(dtype: torch.dtype, ours: bool) -> float:
    """Returns the error of ResNet-20's pooled gradient against float64, for our BN or torch's."""
    x, y = torch.randn(32, 3, 8, 8, dtype=torch.float64), torch.arange(32) % 10
    x[16:] += 1
    found = []
    for kind, federated in ((torch.float64, False), (dtype, ours)):
        model = factory.build(ModelConfig(name=ModelName.resnet20), (3, 8, 8), 10, seed=0).to(kind)
        if not federated:
            Objective().mean_loss(model, x.to(kind), y).backward()
            found.append([value.grad.double() for value in model.parameters()])  # type: ignore[union-attr]
            continue
        model = convert_batchnorm(model)
        clients = [model, copy.deepcopy(model)]
        losses = [
            partial(Objective().mean_loss, client, x[part].to(kind), y[part])
            for client, part in zip(clients, (slice(16), slice(16, 32)), strict=True)
        ]
        federated_backward(clients, losses, [0.5, 0.5])
        pairs = zip(*(client.parameters() for client in clients), strict=True)
        found.append([(a.grad.double() + b.grad.double()) / 2 for a, b in pairs])
    exact, measured = found
    difference = sum(float((a - b).square().sum()) for a, b in zip(measured, exact, strict=True))
    return float((difference / sum(float(a.square().sum()) for a in exact)) ** 0.5)


def test_float32_is_as_close_to_float64_as_torchs_own_batchnorm() -> None:
    torch.manual_seed(0)
    theirs = pooled_error(torch.float32, ours=False)
    torch.manual_seed(0)
    assert pooled_error(torch.float32, ours=True) < 3 * theirs
    torch.manual_seed(0)
    assert pooled_error(torch.float64, ours=True) < 1e-10


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_job_compiles(tmp_path: Path) -> None:
    """torch's default compiler compiles, and the summary has its time."""
    words = ["clients=2", "partition=iid", "rounds=3", "precision=float64", "local_steps=2"]
    accuracies = []
    for name, more in (("eager", []), ("compiled", ["compile=true"])):
        done = commands.run(
            *("torchrun", "--nproc-per-node", "2", "-m", "fedtan_hpc", f"run_dir={name}"),
            *words,
            *more,
            cwd=tmp_path,
            seconds=500,
        )
        assert done.returncode == 0, done.stderr
        assert "cannot compile" not in done.stderr
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        accuracies.append(summary["test_loss"])
        assert (summary["compile_seconds"] > 0) == bool(more)
    assert accuracies[1] == pytest.approx(accuracies[0], rel=1e-10)
