"""The estimate of the clients' memory, and the error if they would not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedtan_hpc.config.enums import OptimizerName
from fedtan_hpc.config.errors import RunError
from fedtan_hpc.config.schema import Config, OptimizerConfig
from fedtan_hpc.data.batching import Samples
from fedtan_hpc.models import resnet
from fedtan_hpc.runtime import free_memory
from fedtan_hpc.tasks.objective import Objective
from fedtan_hpc.training import memory_budget
from fedtan_hpc.training.memory_budget import MemoryBudget
from tests.helpers import networks


def sample() -> Samples:
    return Samples(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))


def test_saved_bytes_are_those_of_the_layers_inputs() -> None:
    x, y = networks.batches("1d", 1)[0]
    module = networks.network("1d")
    widths = 6 + 5 + 5 + 4 + 4 + 3  # inputs of linear and BN layers, outputs of tanh layers
    measured = memory_budget.saved_bytes_per_sample(module, Samples(x[:1], y[:1]), Objective())
    assert 8 * widths <= measured <= 3 * 8 * widths


def budget(optimizer: OptimizerConfig | None = None) -> MemoryBudget:
    config = Config(batch_size=32, optimizer=optimizer or OptimizerConfig())
    return MemoryBudget(resnet.resnet20(3, 10), sample(), config, 1, Objective())


def test_the_model_is_left_as_it_was() -> None:
    module = resnet.resnet20(3, 10)
    before = {name: value.clone() for name, value in module.named_buffers()}
    memory_budget.saved_bytes_per_sample(module, sample(), Objective())
    assert module.training
    assert all(torch.equal(before[name], value) for name, value in module.named_buffers())


def test_the_state_of_the_optimizer_takes_memory() -> None:
    plain = budget().model_bytes
    assert budget(OptimizerConfig(momentum=0.9)).model_bytes == pytest.approx(1.5 * plain)
    assert budget(OptimizerConfig(name=OptimizerName.adamw)).model_bytes == pytest.approx(2 * plain)


def test_an_allocation_that_would_not_fit_says_how_many_clients_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limited = budget()
    each = limited.model_bytes + limited.pass_bytes
    monkeypatch.setattr(memory_budget, "free_bytes", lambda *_: int(3.5 * each))
    with limited.spent_on(3, 3, 1):
        pass
    message = r"rank 0, round 2: 4 clients .* 3 would fit"
    with pytest.raises(RunError, match=message), limited.spent_on(4, 4, 2):
        raise AssertionError("it was tried")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_after_all_says_so_too(error: Exception) -> None:
    with pytest.raises(RunError, match="would fit"), budget().spent_on(4, 4, 1):
        raise error


@pytest.mark.parametrize(
    ("error", "clients"),
    [
        (RuntimeError("another"), 4),
        (MemoryError("my table"), 4),
        (MemoryError("Unable to allocate 7.45 TiB for an array"), 4),
        (RuntimeError(f"can't allocate memory: you tried to allocate {10**13} bytes"), 4),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
    ],
    ids=str,
)
def test_other_errors_stay_what_they_are(error: Exception, clients: int) -> None:
    """Fewer clients would not help where the user's code asks for too much, or with one client."""
    with pytest.raises(type(error)) as raised, budget().spent_on(clients, clients, 1):
        raise error
    assert raised.value is error


def test_one_client_may_always_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "free_bytes", lambda *_: 0)
    with budget().spent_on(1, 1, 1):
        pass


def test_free_memory_is_shared_by_the_ranks_of_a_machine() -> None:
    alone = free_memory.free_bytes(torch.device("cpu"), 1)
    shared = free_memory.free_bytes(torch.device("cpu"), 4)
    if alone is None or shared is None:
        pytest.skip("this system does not tell its free memory")
    assert shared == pytest.approx(alone / 4, rel=0.1)


GROUPS = {
    "version 1": ("4:memory:/job", "sys/fs/cgroup/memory/job", "limit_in_bytes", "usage_in_bytes"),
    "version 2": ("0::/job", "sys/fs/cgroup/job", "max", "current"),
    "version 2 in a container": ("0::/job", "sys/fs/cgroup", "max", "current"),
}


@pytest.mark.parametrize("version", GROUPS)
def test_a_limit_of_the_batch_system_counts(version: str, tmp_path: Path) -> None:
    line, place, limit, used = GROUPS[version]
    groups, folder = tmp_path / "proc/self/cgroup", tmp_path / place
    for parent in (groups.parent, folder):
        parent.mkdir(parents=True)
    groups.write_text(f"{line}\n")
    (folder / f"memory.{limit}").write_text("1000\n")
    (folder / f"memory.{used}").write_text("300\n")
    assert free_memory._left_in_cgroups(tmp_path) == [700]
    (folder / "memory.stat").write_text("anon 200\ninactive_file 50\n")
    assert free_memory._left_in_cgroups(tmp_path) == [750]


def test_no_limit_is_no_number(tmp_path: Path) -> None:
    for parent in ("proc/self", "sys/fs/cgroup"):
        (tmp_path / parent).mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("300\n")
    assert free_memory._left_in_cgroups(tmp_path) == []
