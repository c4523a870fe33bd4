"""The estimate of what clients need, and the error when they would not fit."""

from __future__ import annotations

from pathlib import Path

import networks
import pytest
import torch

from fedtan_hpc import memory, models
from fedtan_hpc.data import Samples
from fedtan_hpc.errors import RunError
from fedtan_hpc.memory import Budget


def sample() -> Samples:
    return Samples(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))


def test_saved_bytes_are_those_of_the_layers_inputs() -> None:
    x, y = networks.batches("1d", 1)[0]
    module = networks.network("1d")
    widths = 6 + 5 + 5 + 4 + 4 + 3  # inputs of linear, BN and tanh layers (tanh keeps its output)
    measured = memory.saved_bytes_per_sample(module, Samples(x[:1], y[:1]))
    assert 8 * widths <= measured <= 3 * 8 * widths


def test_statistics_are_left_alone() -> None:
    module = models.resnet20(3, 10)
    before = {name: value.clone() for name, value in module.named_buffers()}
    Budget(module, sample(), 32, 1)
    assert all(torch.equal(before[name], value) for name, value in module.named_buffers())


def test_an_allocation_that_would_not_fit_says_how_many_clients_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = Budget(models.resnet20(3, 10), sample(), 32, 1)
    monkeypatch.setattr(memory, "free_bytes", lambda *_: int(3.5 * budget.bytes_per_client))
    budget.check(3, 1)
    with pytest.raises(RunError, match=r"rank 0, round 2: 4 clients .* 3 would fit"):
        budget.check(4, 2)


def test_one_client_may_always_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda *_: 0)
    Budget(models.resnet20(3, 10), sample(), 32, 1).check(1, 1)


def test_free_memory_is_shared_by_the_ranks_of_a_machine() -> None:
    alone = memory.free_bytes(torch.device("cpu"), 1)
    shared = memory.free_bytes(torch.device("cpu"), 4)
    if alone is None or shared is None:
        pytest.skip("this system does not tell its free memory")
    assert shared == pytest.approx(alone / 4, rel=0.1)


def test_a_limit_of_the_batch_system_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._within_cgroup(tmp_path) == [700]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._within_cgroup(tmp_path) == []
