"""Compiled steps make the exchanges that eager ones make, and all ranks make them in one order."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.scheduler import BaseSchedulerNode, Scheduler
from torch.utils.checkpoint import checkpoint

import fedtan_hpc
from fedtan_hpc import convert_batchnorm, federated_backward, federated_statistics
from fedtan_hpc.config.algorithms import plan
from fedtan_hpc.config.schema import Config
from fedtan_hpc.data.batching import Samples
from fedtan_hpc.distributed import process_group
from fedtan_hpc.tasks.objective import Objective
from fedtan_hpc.training import compile_step
from fedtan_hpc.training.local_step import Loss
from tests.helpers import commands
from tests.helpers.ranks import on_ranks


def by_inductor(test: Callable[..., None]) -> Callable[..., None]:
    """A test of torch's own compiler."""
    no_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
    marked: Callable[..., None] = pytest.mark.slow(pytest.mark.timeout(600)(no_compiler(test)))
    return marked


class Unused(nn.Module):
    """A layer whose output is not used; its running statistics are."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.used, self.other = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.into(x)
        self.other(hidden)
        y: Tensor = self.out(self.used(hidden))
        return y


class Twice(Unused):
    """A layer that sees the same input twice, which moves its running statistics twice."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.into(x)
        y: Tensor = self.out(self.used(hidden) + self.used(hidden).tanh())
        return y


class Checkpointed(Unused):
    """The backward pass runs two layers again."""

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self._hidden, x, use_reentrant=False)
        y: Tensor = self.out(hidden)
        return y

    def _hidden(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(self.used(self.into(x)).relu())
        return y


class Branches(nn.Module):
    """Parallel branches of several widths."""

    def __init__(self) -> None:
        super().__init__()
        widths = 8, 8, 2048, 2048
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(32, w), nn.BatchNorm1d(w), nn.ReLU(), nn.Linear(w, 3))
            for w in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


def left_by(network: type[nn.Module], loss: Loss, samples: Samples) -> list[Tensor]:
    """Gradients and buffers after two synchronised steps."""
    model = converted(network)
    for _ in range(2):
        with federated_statistics(model, 1 / process_group.world_size()):
            loss(model, samples).backward()
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    return [*gradients, *model.buffers()]


def converted(network: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return convert_batchnorm(network().double())


def own_samples(count: int, width: int) -> Samples:
    torch.manual_seed(1 + process_group.rank())
    return Samples(torch.randn(count, width, dtype=torch.float64), torch.arange(count) % 3)


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    assert len(found) == len(expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def error_by_aot(network: type[nn.Module]) -> float:
    samples = own_samples(5 + process_group.rank(), 4)
    torch.compiler.reset()
    step = torch.compile(Objective().mean_loss, backend="aot_eager", fullgraph=True)
    compiled = left_by(network, Loss(compiled=step), samples)
    return worst(compiled, left_by(network, Loss(), samples))


@pytest.mark.parametrize("network", [Unused, Twice, Checkpointed])
def test_the_compiler_neither_drops_nor_merges_exchanges(network: type[nn.Module]) -> None:
    assert max(on_ranks(2, error_by_aot, network)) < 1e-12


def error_by_inductor() -> float:
    samples = own_samples((4, 256)[process_group.rank()], 32)
    rounds = [plan(Config(), 1)]
    loss = compile_step.compiled(Loss(), converted(Branches), samples, rounds, synchronised=True)
    assert loss.compiled is not None
    return worst(left_by(Branches, loss, samples), left_by(Branches, Loss(), samples))


@by_inductor
def test_ranks_with_other_batches_exchange_in_the_same_order() -> None:
    """By torch's own compiler, which would order branches by the memory that they take."""
    assert max(on_ranks(2, error_by_inductor, seconds=200)) < 1e-12  # the C++ compiler may be busy


@by_inductor
def test_cuda_graphs_end_where_statistics_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch would leave out of CUDA graphs, if the operators were on a GPU."""
    left_out: dict[str, bool] = {}
    judge = Scheduler.should_partition

    def judged(self: Scheduler, node: BaseSchedulerNode) -> str | None:
        with monkeypatch.context() as patch:
            patch.setattr(BaseSchedulerNode, "is_gpu", lambda self: True)
            reason = judge(self, node)
        if operation := getattr(node.node, "op_overload", None):
            left_out[str(operation)] = reason is not None
        return reason

    monkeypatch.setattr(Scheduler, "should_partition", judged)
    monkeypatch.setattr(compile_step, "_modes", lambda device: [compile_step.GRAPHS])
    samples, rounds = own_samples(4, 4), [plan(Config(), 1)]
    with torch._inductor.config.patch(force_disable_caches=True):
        compile_step.compiled(Loss(), converted(Twice), samples, rounds, synchronised=True)
    exchanges = {name for name in left_out if name.startswith("fedtan_hpc.share_")}
    assert len(exchanges) == 2
    assert {name for name, is_out in left_out.items() if is_out} == exchanges


def replicas_graphs() -> tuple[int, float]:
    """Graphs of ten clients' models, and how far gradients are from those of eager steps."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    found = []
    for step in (
        Objective().mean_loss,
        torch.compile(Objective().mean_loss, backend=count, fullgraph=True),
    ):
        models = [converted(Unused) for _ in range(10)]
        clients = [(model, own_samples(5, 4)) for model in models]
        losses = [partial(step, model, s.inputs, s.labels) for model, s in clients]
        federated_backward(models, losses, [0.05] * 10)
        gradients = [value.grad for model in models for value in model.parameters()]
        found.append([value for value in gradients if value is not None])
    return len(graphs), worst(*found)


def test_copies_of_a_model_are_one_graph() -> None:
    for graphs, error in on_ranks(2, replicas_graphs):
        assert graphs == 1
        assert error < 1e-12


STEP = """
import torch
from torch import nn
from fedtan_hpc import convert_batchnorm, federated_statistics

torch.manual_seed(0)
model = convert_batchnorm(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sigmoid()))
with federated_statistics(model, 1.0):
    torch.compile(model)(torch.randn(5, 4)).sum().backward()
print(model[0].weight.grad.tolist())
"""


@by_inductor
def test_code_on_disk_is_not_taken_for_that_of_other_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version of the package may differentiate otherwise."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    package = tmp_path / "fedtan_hpc"
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(fedtan_hpc.__file__).parent, package, ignore=without)
    (tmp_path / "step.py").write_text(STEP)
    old = commands.run("python", "step.py", cwd=tmp_path, seconds=200)
    rules_file = package / "batchnorm" / "compile_ops.py"
    rules = rules_file.read_text()
    assert "return -first" in rules
    rules_file.write_text(rules.replace("return -first", "return -2 * first"))
    new = commands.run("python", "step.py", cwd=tmp_path, seconds=200)
    assert "[[" in old.stdout, old.stderr
    assert "[[" in new.stdout, new.stderr
    assert old.stdout != new.stdout
