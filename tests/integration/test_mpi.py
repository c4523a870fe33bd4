"""torch.distributed over mpi4py: its collectives, whole jobs by mpirun, and how jobs end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedtan_hpc.config.errors import LauncherError
from fedtan_hpc.runtime.launcher_env import detect
from tests.helpers import commands, documents
from tests.helpers.ranks import MPI_VARIABLES, MPIEXEC, MPIWorld

pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install -e '.[test]'")
LAUNCHER = "MPICH" if {d.name for d in metadata.distributions()} & {"mpich"} else "Open MPI"
RANKS = 3
DTYPES = [torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.float16, torch.uint8]


@pytest.fixture(scope="module")
def world() -> Iterator[MPIWorld]:
    """Three ranks that mpiexec starts."""
    ranks = MPIWorld(RANKS)
    yield ranks
    ranks.end()


def values_of(dtype: torch.dtype, rank: int | None = None) -> Tensor:
    """Returns a rank's tensor, (2, 3), of small whole numbers that every dtype adds up exactly."""
    rank = dist.get_rank() if rank is None else rank
    return (torch.arange(6).view(2, 3) + 2 * rank + 1).to(dtype)


def all_values(dtype: torch.dtype) -> list[Tensor]:
    return [values_of(dtype, rank) for rank in range(RANKS)]


def reductions(dtype: torch.dtype) -> None:
    stacked = torch.stack(all_values(dtype))
    expected = {
        dist.ReduceOp.SUM: stacked.double().sum(0),
        dist.ReduceOp.MAX: stacked.double().amax(0),
        dist.ReduceOp.MIN: stacked.double().amin(0),
    }
    for operation, result in expected.items():
        value = values_of(dtype)
        dist.all_reduce(value, op=operation)
        assert torch.equal(value.double(), result)
        transposed = values_of(dtype).t()  # not contiguous
        dist.all_reduce(transposed, op=operation)
        assert torch.equal(transposed.double(), result.t())
        value = values_of(dtype)
        dist.reduce(value, dst=1, op=operation)
        if dist.get_rank() == 1:
            assert torch.equal(value.double(), result)
        part = torch.empty(3, dtype=dtype)
        parts = [row.contiguous() for row in values_of(dtype).repeat(2, 1)[:RANKS]]
        dist.reduce_scatter(part, parts, op=operation)
        rows = torch.stack([v.repeat(2, 1)[dist.get_rank()] for v in all_values(dtype)]).double()
        by_hand = {dist.ReduceOp.SUM: rows.sum(0)}
        by_hand |= {dist.ReduceOp.MAX: rows.amax(0), dist.ReduceOp.MIN: rows.amin(0)}
        assert torch.equal(part.double(), by_hand[operation])


def copies(dtype: torch.dtype) -> None:
    rank, values = dist.get_rank(), all_values(dtype)
    value = values_of(dtype)
    dist.broadcast(value, src=2)
    assert torch.equal(value, values[2])
    gathered = [torch.empty_like(value) for _ in range(RANKS)]
    dist.all_gather(gathered, values_of(dtype))
    assert all(torch.equal(a, b) for a, b in zip(gathered, values, strict=True))
    whole = torch.empty(RANKS * 2, 3, dtype=dtype)
    dist.all_gather_into_tensor(whole, values_of(dtype))
    assert torch.equal(whole, torch.cat(values))
    gathered = [torch.empty_like(value) for _ in range(RANKS)]
    dist.gather(values_of(dtype), gathered if rank == 1 else None, dst=1)
    assert rank != 1 or all(torch.equal(a, b) for a, b in zip(gathered, values, strict=True))
    part = torch.empty_like(value)
    dist.scatter(part, values if rank == 0 else None, src=0)
    assert torch.equal(part, values[rank])
    received = [torch.empty(rank + 1, dtype=dtype) for _ in range(RANKS)]
    dist.all_to_all(
        received, [torch.full((to + 1,), 3 * rank + to, dtype=dtype) for to in range(RANKS)]
    )
    for source, value_from_rank in enumerate(received):
        assert torch.equal(value_from_rank, torch.full((rank + 1,), 3 * source + rank, dtype=dtype))
    single = torch.empty(RANKS, dtype=dtype)
    dist.all_to_all_single(single, torch.full((RANKS,), rank, dtype=dtype))
    assert torch.equal(single, torch.arange(RANKS).to(dtype))
    if rank == 0:
        dist.send(values_of(dtype), dst=1)
    if rank == 1:
        dist.recv(value, src=0)
        assert torch.equal(value, values[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_collectives_do_what_torch_says_for_every_type(world: MPIWorld, dtype: torch.dtype) -> None:
    world.call(reductions, (dtype,), 60)
    world.call(copies, (dtype,), 60)


def others() -> None:
    rank = dist.get_rank()
    truth = torch.tensor([rank == 0, False, True])
    dist.all_reduce(truth, op=dist.ReduceOp.MAX)
    assert truth.tolist() == [True, False, True]
    mean = torch.full((2,), float(rank))
    dist.all_reduce(mean, op=dist.ReduceOp.AVG)
    assert mean.tolist() == [1.0, 1.0]
    dist.barrier()
    gathered: list[object] = [None] * RANKS
    dist.all_gather_object(gathered, {"rank": rank})
    assert gathered == [{"rank": r} for r in range(RANKS)]
    box = [rank]
    dist.broadcast_object_list(box, src=1)
    assert box == [1]
    pair = dist.new_group([0, 2])
    value = torch.tensor([rank + 1.0])
    if rank != 1:
        dist.all_reduce(value, group=pair)
        assert value.item() == 4.0
    work = dist.all_reduce(value, async_op=True)
    assert work is not None
    work.wait()
    premultiplied = dist._make_nccl_premul_sum(0.5)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="multiply before"):
        dist.all_reduce(value, op=premultiplied)


def test_objects_groups_and_other_operations(world: MPIWorld) -> None:
    world.call(others, (), 60)


def data_parallel() -> list[float]:
    torch.manual_seed(dist.get_rank())
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
    model(torch.full((2, 3), float(dist.get_rank()))).sum().backward()
    return [value for p in model.parameters() for value in p.grad.flatten().tolist()]  # type: ignore[union-attr]


def test_torchs_own_data_parallelism_runs_over_it(world: MPIWorld) -> None:
    assert world.call(data_parallel, (), 60) == [[2.0, 2.0, 2.0, 2.0]] * RANKS


def mpirun(number: int, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MPIEXEC, "-n", str(number), sys.executable, *words],
        cwd=cwd,
        env={
            **os.environ,
            **MPI_VARIABLES,
            "PYTHONPATH": str(commands.ROOT),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


SHORT = ("clients=3", "rounds=2", "local_steps=1", "run_dir=here")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mpi", "gloo"])
def test_mpirun_starts_a_job(backend: str, tmp_path: Path) -> None:
    """The result equals that of a single process up to rounding."""
    more = [] if backend == "mpi" else ["comm.backend=gloo"]
    done = mpirun(2, "-m", "fedtan_hpc", *SHORT, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"launcher {LAUNCHER}, nodes 1, ranks 2, backend {backend}" in done.stdout
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert (summary["world_size"], summary["backend"]) == (2, backend)
    alone = commands.job(*SHORT[:-1], "run_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    expected = json.loads((tmp_path / "alone" / "summary.json").read_text())
    assert summary["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)


LOOPS = [
    block.text
    for page in documents.PAGES
    for block in documents.blocks(documents.read(page), "python")
    if documents.program(block) and "mpi.init_process_group" in block.text
]
"""Programs of the documents that say how to use the backend without the job."""


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS, ids=range(len(LOOPS)))
def test_the_documents_training_loops_run_over_it(loop: str, tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(loop, encoding="utf-8")
    done = mpirun(2, "-m", "mpi4py", "loop.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


FAULT = """
import sys
from fedtan_hpc.distributed import process_group
from fedtan_hpc.training.cohort import Cohort
begin_round = Cohort.begin_round
def faulty(self, context):
    if process_group.rank() == 1 and context.number == 2:
        raise OSError("the disk of this node is gone")
    return begin_round(self, context)
Cohort.begin_round = faulty
from fedtan_hpc.cli import main
main()
"""


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_whole_job(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULT)
    done = mpirun(2, "faulty.py", *SHORT, cwd=tmp_path)
    assert done.returncode == 1
    assert "rank 1, round 2: OSError: the disk of this node is gone" in done.stderr


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = mpirun(2, "-m", "fedtan_hpc", "rounds=0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("fedtan_hpc: rounds=0: ") == 1


def test_ranks_are_read_from_either_mpi() -> None:
    open_mpi = {
        f"OMPI_COMM_WORLD_{name}": str(i + 1)
        for i, name in enumerate(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    }
    assert detect(open_mpi).launcher == "Open MPI"
    assert (detect(open_mpi).rank, detect(open_mpi).world_size, detect(open_mpi).local_rank) == (
        1,
        2,
        3,
    )
    mpich = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    assert (detect(mpich).launcher, detect(mpich).rank) == ("MPICH", 2)
    assert (detect(mpich).local_rank, detect(mpich).local_world_size) == (0, 2)
    assert detect({**mpich, "RANK": "0", "WORLD_SIZE": "1"}).launcher == "torchrun"


@pytest.mark.parametrize(
    ("version", "variable", "launcher"),
    [
        ("Open MPI v5.0.11, package: ...", "PMI_SIZE", "MPICH"),
        ("MPICH Version:      5.0.2\nMPICH ABI: ...", "OMPI_COMM_WORLD_SIZE", "Open MPI"),
    ],
)
def test_the_launcher_of_another_mpi_is_named(version: str, variable: str, launcher: str) -> None:
    from fedtan_hpc.distributed.mpi import library

    with pytest.raises(LauncherError) as caught:
        library.check_launcher(version, {variable: "7"})
    assert str(caught.value).startswith(f"{variable}=7: allowed is the launcher of ")
    assert f"not with {launcher}'s, or install {launcher}" in str(caught.value)
    for known, name in (("PMI_SIZE", "MPICH"), ("OMPI_COMM_WORLD_SIZE", "Open MPI")):
        library.check_launcher(name, {known: "7"})


def error_for_another_size() -> str:
    from fedtan_hpc.distributed.mpi import library

    variable = "PMI_SIZE" if LAUNCHER == "MPICH" else "OMPI_COMM_WORLD_SIZE"
    with pytest.raises(LauncherError) as caught:
        library.initialise({variable: "7"})
    return str(caught.value)


def test_a_launcher_that_started_more_ranks_than_mpi_knows_is_a_mistake(world: MPIWorld) -> None:
    for message in world.call(error_for_another_size, (), 60):
        assert "_SIZE=7: allowed is the launcher of" in message


def test_mpi_without_mpirun_is_a_mistake(tmp_path: Path) -> None:
    done = commands.ranks(2, "comm.backend=mpi", *SHORT, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("fedtan_hpc: comm.backend=mpi: ") == 1


@pytest.mark.slow
def test_a_plain_job_imports_no_mpi(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['x', 'rounds=1', 'local_steps=1', 'run_dir=here']; "
        "from fedtan_hpc.cli import main; main(); "
        "assert not [name for name in sys.modules if name.startswith('mpi4py')]"
    )
    done = commands.run("python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
