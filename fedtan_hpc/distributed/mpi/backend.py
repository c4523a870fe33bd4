"""mpi4py registered as a backend of torch.distributed, for CPU tensors and CUDA-aware MPI.

FedTAN sends mostly small sums: over MPI's shared memory one takes some ten microseconds, over gloo
a millisecond.  Contiguous tensors are sent without a copy, others as copies; tensors of half
precision are summed in float32.  ``distributed.process_group`` uses this module.
"""

import time
from typing import Any

import torch.distributed as dist

from . import library
from .library import MPI
from .process_group import create_group

NAME = "mpi4py"
"""Name of the backend in torch.distributed; torch's compiled MPI backend is called mpi."""
_MESSAGE_SECONDS = 1.0
"""Time for mpiexec to pass on the last message; MPICH drops what it reads after an abort."""


def share(value: Any) -> Any:
    """Returns rank 0's ``value`` on every process of the launcher; needs no process group."""
    library.initialise()
    return MPI.COMM_WORLD.bcast(value)


def abort(code: int) -> None:
    """Ends all processes of the job with exit code ``code``; without this they would hang."""
    if MPI.Is_initialized() and not MPI.Is_finalized():
        time.sleep(_MESSAGE_SECONDS)
        MPI.COMM_WORLD.Abort(code)


def init_process_group() -> None:
    """Makes all processes that mpirun started torch.distributed's default group, over MPI.

    Raises ``LauncherError`` if the mpirun of another MPI started them.
    """
    library.initialise()
    if NAME not in dist.Backend.backend_list:
        devices = ["cpu", "cuda"]
        dist.Backend.register_backend(NAME, create_group, extended_api=True, devices=devices)
    world, store = MPI.COMM_WORLD, dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(NAME, store=store, rank=world.rank, world_size=world.size)
