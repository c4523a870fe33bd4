"""The MPI backend in a user's own loop: what does not wait, what ends, what torch offers beside."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.ranks import MPIWorld
from tests.integration.test_mpi import mpirun

pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install -e '.[test]'")
MEGABYTE = 250_000
"""float32 values of which MPI does not send any before the receiver is ready."""


@pytest.fixture(scope="module")
def world() -> Iterator[MPIWorld]:
    ranks = MPIWorld(3)
    yield ranks
    ranks.end()


def messages_in_the_same_order(count: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    before, after = (rank - 1) % size, (rank + 1) % size
    sent = torch.full((count,), float(rank))
    got = torch.empty(count)
    receiving = dist.irecv(got, src=before)
    dist.send(sent, dst=after)
    assert receiving is not None
    receiving.wait()
    assert torch.equal(got, torch.full((count,), float(before)))
    ring = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, got.zero_(), before)]
    for work in dist.batch_isend_irecv(ring):
        work.wait()
    assert torch.equal(got, torch.full((count,), float(before)))


@pytest.mark.parametrize("count", [1, MEGABYTE])
def test_ranks_may_receive_and_send_in_the_same_order(world: MPIWorld, count: int) -> None:
    world.call(messages_in_the_same_order, (count,), 60)


def collective_before_message() -> None:
    rank, total = dist.get_rank(), torch.ones(3)
    if rank == 1:
        dist.recv(torch.empty(1), src=0)
    work = dist.all_reduce(total, async_op=True)
    if rank == 0:
        dist.send(torch.ones(1), dst=1)
    future = work.get_future()
    assert torch.equal(future.then(lambda done: done.value()[0] + 1).wait(), torch.full((3,), 4.0))


def test_asynchronous_collectives_do_not_wait(world: MPIWorld) -> None:
    world.call(collective_before_message, (), 60)


def from_any_rank() -> None:
    if dist.get_rank() == 0:
        value = torch.empty(1)
        sources = {dist.recv(value): value.item() for _ in range(2)}
        assert sources == {1: 1.0, 2: 2.0}
    else:
        dist.send(torch.tensor([float(dist.get_rank())]), dst=0)


def beside_gloo() -> None:
    group = dist.new_group(backend="gloo")
    value = torch.ones(1)
    dist.all_reduce(value, group=group)
    assert value.item() == 3.0
    dist.monitored_barrier(group)


def methods_of_the_group() -> None:
    group, value = dist.group.WORLD, torch.ones(2)
    assert group is not None
    group.allreduce(value).wait()
    group.allreduce([value], dist.ReduceOp.MAX).wait()
    group.allreduce([value]).wait()
    assert value.tolist() == [9.0, 9.0]
    value.fill_(dist.get_rank())
    group.broadcast(value, 1).wait()
    assert value.tolist() == [1.0, 1.0]
    gathered = [torch.empty(2) for _ in range(3)]
    group.allgather(gathered, value).wait()
    group.reduce(value, root=0, op=dist.ReduceOp.SUM).wait()
    assert value.tolist() == ([3.0, 3.0] if dist.get_rank() == 0 else [1.0, 1.0])
    group.barrier().wait()


def other_kinds_of_tensors() -> None:
    rank = dist.get_rank()
    expected = {"BAND": [True, False], "BOR": [True, True], "BXOR": [True, True]}
    for name, result in expected.items():
        truth = torch.tensor([True, rank == 0])
        dist.all_reduce(truth, op=getattr(dist.ReduceOp, name))
        assert truth.tolist() == result, name
    with pytest.raises(ValueError, match="BAND is for integers and bool"):
        dist.all_reduce(torch.ones(1), op=dist.ReduceOp.BAND)
    mean = torch.tensor([3 + rank, -3 - rank])
    dist.all_reduce(mean, op=dist.ReduceOp.AVG)
    assert mean.tolist() == [4, -4]
    sparse = torch.zeros(4, 2).index_fill_(0, torch.arange(rank + 1), 1.0).to_sparse()
    dist.all_reduce(sparse)
    assert sparse.to_dense()[:, 0].tolist() == [3.0, 2.0, 1.0, 0.0]


def compiled_data_parallel() -> None:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        compiled(torch.full((2, 4), float(dist.get_rank()))).square().sum().backward()


def a_mixed_call() -> None:
    received, rank = torch.empty(3), dist.get_rank()
    pending = dist.irecv(torch.empty(1), src=(rank + 1) % 3)
    dist.all_to_all_single(received, torch.arange(3.0))  # must not take what irecv waits for
    assert received.tolist() == [float(rank)] * 3
    dist.send(torch.ones(1), dst=(rank - 1) % 3)
    assert pending is not None
    pending.wait()


@pytest.mark.parametrize(
    "part",
    [
        from_any_rank,
        beside_gloo,
        methods_of_the_group,
        other_kinds_of_tensors,
        compiled_data_parallel,
        a_mixed_call,
    ],
)
def test_it_does_what_gloo_does(world: MPIWorld, part: object) -> None:
    world.call(part, (), 100)  # type: ignore[arg-type]


def late(seconds: float) -> str | None:
    """The last rank does not come; the others get an error in time."""
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    if dist.get_rank() == 2:
        return None
    with pytest.raises(dist.DistBackendError) as caught:
        dist.barrier(group=group)
    with pytest.raises(dist.DistBackendError, match=r"^recv from rank 2 .* Timed out after 0\.5 s"):
        dist.irecv(torch.empty(1), src=2, group=group).wait(timedelta(seconds=0.5))  # type: ignore[union-attr]
    return str(caught.value)


@pytest.mark.slow
def test_time_outs_are_kept_and_name_the_collective() -> None:
    ranks = MPIWorld(3)
    try:
        first, _, missing = ranks.call(late, (3.0,), 60)
    finally:
        ranks.end()
    assert missing is None
    assert first.startswith("barrier of rank 0 (group ")
    assert "3 ranks) over MPI: Timed out after 3 s: " in first


def loop(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of a user's own program, with a time-out of 3 seconds."""
    begin = (
        "from datetime import timedelta; import torch, time, torch.distributed as dist\n"
        "from fedtan_hpc import mpi; mpi.init_process_group(timedelta(seconds=3))\n"
        "r = dist.get_rank(); t = torch.ones(4)\n"
    )
    (tmp_path / "loop.py").write_text(f"{begin}{body}\nprint('end', r, flush=True)\n")
    return mpirun(2, "loop.py", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("dist.all_reduce(t) if r else time.sleep(60)", "all_reduce of rank 1"),
        ("dist.broadcast(t, 0) if r else time.sleep(60)", "broadcast of rank 1"),
        ("dist.all_reduce(t) if r else dist.broadcast(t, 0)", ""),
        ("dist.all_reduce(t) if r else dist.barrier()", ""),
        ("dist.all_reduce(t) if r else dist.all_gather([t, t.clone()], t)", ""),
        ("dist.all_reduce(torch.ones(4 + 4 * r)); dist.barrier()", ""),
        ("dist.broadcast(torch.ones(4 + 4 * r), 1); dist.barrier()", ""),
        ("dist.all_reduce(t.double() if r else t); dist.barrier()", ""),
        ("dist.broadcast(t.double() if r else t, 1); dist.barrier()", ""),
        ("u = torch.ones(4 + 4 * r); dist.all_gather([u, u.clone()], u); dist.barrier()", ""),
        ("dist.send(torch.ones(9), 1) if r == 0 else dist.recv(t, 0); dist.barrier()", ""),
    ],
)
def test_ranks_that_differ_or_are_missing_end_the_program(
    tmp_path: Path, body: str, name: str
) -> None:
    done = loop(tmp_path, body)
    assert done.returncode != 0, done.stdout
    assert f"{name}" in done.stderr
    # MPICH ends the program itself where an all-reduce that blocks gets too long a message.
    assert " over MPI: " in done.stderr or "Fatal error in internal_Allreduce" in done.stderr


@pytest.mark.slow
def test_mpi4py_starts_mpi_for_others_as_ever(tmp_path: Path) -> None:
    program = "import fedtan_hpc; fedtan_hpc.mpi\nfrom mpi4py import MPI\n"
    program += "import os; os.write(1, b'rank%d ' % MPI.COMM_WORLD.Get_rank())\n"  # in one piece
    (tmp_path / "own.py").write_text(program)
    done = mpirun(2, "own.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["rank0", "rank1"]
