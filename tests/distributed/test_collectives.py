"""Starting and stopping the process group."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
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


def test_a_process_may_start_many_times(tmp_path: Path) -> None:
    """As a sweep does; a rank may be at its next start while the other still stops."""
    (tmp_path / "starts.py").write_text(SCRIPT, encoding="utf-8")
    done = commands.run("torchrun", "--nproc-per-node", "2", "starts.py", cwd=tmp_path, seconds=50)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2


def parts(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A rank's, of values whose sum depends on the order of adding."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return (values * 10.0 ** (4 * rank)).to(dtype)


def sums(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By ``collectives``, in place, over all ranks; and over a group of the last two."""
    message = parts(process_group.rank(), shape, dtype)
    message.requires_grad_(dtype.is_floating_point)
    place = message.data_ptr()
    found = collectives.sum_over_ranks(message)
    assert found is message
    assert found.data_ptr() == place
    import torch.distributed as dist

    some = dist.new_group([1, 2])
    of_some = parts(process_group.rank(), shape, dtype)
    if process_group.rank() > 0:
        collectives.sum_for_training(of_some, some)
    return found.detach(), of_some


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (71,), (3, 5), (10_000,)], ids=str)
def test_a_sum_has_the_same_bits_on_every_rank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whether it goes round or to all at once, as small messages over gloo do."""
    exact = [parts(rank, shape, dtype) for rank in range(3)]
    found = on_ranks(3, sums, shape, dtype)
    for of_all, _ in found:
        assert of_all.dtype is dtype
        assert torch.equal(of_all, found[0][0])
        torch.testing.assert_close(of_all, exact[0] + exact[1] + exact[2])
    for _, of_some in found[1:]:
        assert torch.equal(of_some, found[1][1])
        torch.testing.assert_close(of_some, exact[1] + exact[2])


class OnGpu:
    """A stand-in for a tensor there: the host waits in ``cpu``."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def cpu(self) -> Tensor:
        self.seen.append(counters.progress.waiting_since is not None)
        return torch.zeros(1)


def test_a_watchdog_sees_a_rank_wait_where_it_reads() -> None:
    """And not that it has begun another collective, which others have not."""
    message, joined = OnGpu(), counters.progress.joined
    collectives.to_cpu(message)  # type: ignore[arg-type]
    assert message.seen == [True]
    assert counters.progress.waiting_since is None
    assert counters.progress.joined == joined


READING = re.compile(
    r"\.(tolist|item|cpu)\(\)|\b(float|int|bool)\((collectives\.)?(sum_|max_|all_)"
)


def test_what_collectives_leave_is_read_where_a_watchdog_sees_it() -> None:
    """A naked read of a sum is a place to hang unseen on a GPU."""
    for path in sorted(Path(fedtan_hpc.__file__).parent.rglob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"\b(sum_over|sum_for|max_over|all_gather\(|gather_)", line):
                assert not READING.search(line) or "to_cpu" in line, (path.name, line)
