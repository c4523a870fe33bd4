"""mpi4py as a backend of torch.distributed: CPU tensors over MPI, in place where they allow it.

Small sums are what FedTAN sends most; over MPI's shared memory they take some ten microseconds
where gloo takes a millisecond.  Contiguous tensors are sent as they lie, others as copies;
half-precision ones are added up as float32.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from . import library
from .library import MPI
from .process_group import MPIGroup

NAME = "mpi4py"
"""Of the backend in torch.distributed; torch has a compiled one of its own called mpi."""

_LAST_WORDS_SECONDS = 1.0
"""For mpiexec to pass on what this rank has said; MPICH's drops what it reads after an abort."""


def share(value: Any) -> Any:
    """Rank 0's ``value`` on every process of the launcher, before there is a process group."""
    library.initialise()
    return MPI.COMM_WORLD.bcast(value)


def abort(code: int) -> None:
    """End all processes of the job with exit code ``code``; an uncaught exception would hang it."""
    if MPI.Is_initialized() and not MPI.Is_finalized():
        time.sleep(_LAST_WORDS_SECONDS)
        MPI.COMM_WORLD.Abort(code)


def init_process_group() -> None:
    """Join torch.distributed's default group over MPI: all processes that mpirun started.

    Raises ``LauncherError`` if that was the mpirun of another MPI.
    """
    library.initialise()
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])
    world, nobody = MPI.COMM_WORLD, dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(NAME, store=nobody, rank=world.rank, world_size=world.size)


def _create(options: Any, _: Any = None) -> MPIGroup:
    """The group of the ranks that torch names, in their order."""
    ranks = list(options.global_ranks_in_group)
    world = MPI.COMM_WORLD
    if not ranks or ranks == list(range(world.size)):
        return MPIGroup(world.Dup())
    return MPIGroup(world.Create_group(world.group.Incl(ranks)))
