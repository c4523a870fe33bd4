"""Process groups that start and stop, sums over ranks, and reads that the watchdog sees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fedtan_hpc
from fedtan_hpc.distributed import collectives, counters, process_group
from tests.helpers import commands
from tests.helpers.ranks import on_ranks

STARTS = 40
SCRIPT = f"""
import torch
from fedtan_hpc.distributed import collectives, process_group
from fedtan_hpc.runtime import launcher_env

info = launcher_env.detect()
for start in range({STARTS}):
    process_group.start(info.rank, info.world_size, "gloo", timeout_seconds=20.0)
    total = collectives.sum_over_ranks(torch.tensor(float(start + info.rank)))
    assert total == 2 * start + 1, (start, total)
    process_group.stop()
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_process_may_start_many_times(tmp_path: Path) -> None:
    """A sweep does so; one rank may already start again while the other still stops."""
    (tmp_path / "starts.py").write_text(SCRIPT, encoding="utf-8")
    done = commands.run("torchrun", "--nproc-per-node", "2", "starts.py", cwd=tmp_path, seconds=50)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2


def summand(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns a rank's values, whose sum over ranks depends on the order of adding."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return (values * 10.0 ** (4 * rank)).to(dtype)


def sums(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the sum over all ranks, made in place, and that over the group of the last two."""
    message = summand(process_group.rank(), shape, dtype)
    message.requires_grad_(dtype.is_floating_point)
    address = message.data_ptr()
    total = collectives.sum_over_ranks(message)
    assert total is message
    assert total.data_ptr() == address
    pair = dist.new_group([1, 2])
    of_pair = summand(process_group.rank(), shape, dtype)
    if process_group.rank() > 0:
        collectives.sum_for_training(of_pair, pair)
    return total.detach(), of_pair


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (71,), (3, 5), (10_000,)], ids=str)
def test_a_sum_has_the_same_bits_on_every_rank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Large messages pass round a ring; over gloo small ones go to all ranks at once."""
    summands = [summand(rank, shape, dtype) for rank in range(3)]
    by_rank = on_ranks(3, sums, shape, dtype)
    for total, _ in by_rank:
        assert total.dtype is dtype
        assert torch.equal(total, by_rank[0][0])
        torch.testing.assert_close(total, summands[0] + summands[1] + summands[2])
    for _, of_pair in by_rank[1:]:
        assert torch.equal(of_pair, by_rank[1][1])
        torch.testing.assert_close(of_pair, summands[1] + summands[2])


def counts() -> list[tuple[int, int, int, int]]:
    """Returns what statistics, a model and a state that only moves add to the counters."""
    used_by_call = []
    for of_models, is_payload in ((False, True), (True, True), (True, False)):
        before = counters.training_traffic.copy()
        message = torch.ones(3)
        collectives.sum_for_training(message, of_models=of_models, is_payload=is_payload)
        used = counters.training_traffic.since(before)
        assert (used.average_seconds > 0) is (of_models and process_group.is_started())
        assert (used.statistics_seconds > 0) is (not of_models and process_group.is_started())
        used_by_call.append((used.messages, used.bytes, used.payload_messages, used.payload_bytes))
    return used_by_call


def test_tensors_that_only_move_are_counted_but_are_no_payload() -> None:
    assert on_ranks(2, counts) == [[(1, 12, 1, 12), (1, 12, 1, 12), (1, 12, 0, 0)]] * 2


def test_a_single_process_sends_nothing_and_counts_payload() -> None:
    assert counts() == [(0, 0, 1, 12), (0, 0, 1, 12), (0, 0, 0, 0)]


class OnGpu:
    """A stand-in for a tensor on a GPU: the host waits in ``cpu``."""

    def __init__(self) -> None:
        self.waits: list[bool] = []

    def cpu(self) -> Tensor:
        self.waits.append(counters.progress.waiting_since is not None)
        return torch.zeros(1)


def test_the_watchdog_sees_that_a_rank_waits_where_it_reads() -> None:
    """A read does not count as another collective, since other ranks may not read."""
    message, begun = OnGpu(), counters.progress.collectives
    collectives.to_cpu(message)  # type: ignore[arg-type]
    assert message.waits == [True]
    assert counters.progress.waiting_since is None
    assert counters.progress.collectives == begun


COLLECTIVE = re.compile(r"\b(sum_over|sum_for|max_over|all_gather\(|gather_)")
READING = re.compile(
    r"\.(tolist|item|cpu)\(\)|\b(float|int|bool)\((collectives\.)?(sum_|max_|all_)"
)


def is_unseen_read(line: str) -> bool:
    """Returns whether a line reads the result of a collective without ``to_cpu``."""
    return bool(COLLECTIVE.search(line) and READING.search(line)) and "to_cpu" not in line


@pytest.mark.parametrize(
    ("line", "is_unseen"),
    [
        ("loss = collectives.sum_over_ranks(loss).tolist()", True),
        ("loss = float(sum_over_ranks(loss))", True),
        ("peak = int(collectives.max_over_ranks(peak))", True),
        ("parts = torch.stack(collectives.all_gather(part)).cpu()", True),
        ("parts = collectives.to_cpu(torch.stack(collectives.all_gather(part)))", False),
        ("loss = to_cpu(sum_over_ranks(loss)).tolist()", False),
        ("unpack(collectives.sum_for_training(pack(sums)), sums)", False),
    ],
)
def test_unseen_reads_are_recognised(line: str, is_unseen: bool) -> None:
    assert is_unseen_read(line) is is_unseen


def test_results_of_collectives_are_read_where_the_watchdog_sees_it() -> None:
    """On a GPU a rank would hang unseen in any other read."""
    lines = [
        (path.name, line)
        for path in sorted(Path(fedtan_hpc.__file__).parent.rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert sum(bool(COLLECTIVE.search(line)) for _, line in lines) > 10
    assert not [(name, line) for name, line in lines if is_unseen_read(line)]
