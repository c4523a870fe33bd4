"""mpi4py registered as a backend of torch.distributed, for CPU tensors and CUDA-aware MPI.

FedTAN sends mostly small sums: over MPI's shared memory one takes some ten microseconds, over gloo
a millisecond.  Contiguous tensors are sent without a copy, others as copies; tensors of half
precision are summed in float32.  ``distributed.process_group`` uses this module.

MPI is loaded when a process group starts: mpi4py's own start is left to programs that load MPI.
"""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .. import rendezvous

_c10d: Any = dist


def share(value: Any) -> Any:
    """Returns rank 0's ``value`` on every process of the launcher; needs no process group."""
    from . import library

    library.initialise()
    return library.MPI.COMM_WORLD.bcast(value)


def init_process_group(timeout: timedelta | None = None) -> None:
    """Makes all processes that mpirun started torch.distributed's default group, over MPI.

    An operation that a rank does not join within ``timeout``, by default torch's 30 minutes, ends
    with ``DistBackendError``; an all-reduce that blocks ends the job with a message.

    Raises ``LauncherError`` if the mpirun of another MPI started them.
    """
    world = _initialised_world()
    from .communicator import NAME
    from .process_group import create_group

    if NAME not in dist.Backend.backend_list:
        devices = ["cpu", "cuda"]
        dist.Backend.register_backend(NAME, create_group, extended_api=True, devices=devices)
        _skip_in_graphs()
    store = _shared_store(world.rank)
    dist.init_process_group(
        NAME, store=store, rank=world.rank, world_size=world.size, timeout=timeout
    )


def _initialised_world() -> Any:
    from . import library

    library.initialise()
    return library.MPI.COMM_WORLD


_stores: list[Any] = []
"""The store of all ranks, kept until the process ends, and one view of it for each start."""


def _shared_store(rank: int) -> Any:
    """Returns a store of all ranks with keys of this start alone.

    Groups of other backends find each other in it.
    """
    _stores.append(_c10d.PrefixStore(f"start{len(_stores)}", shared_store(rank)))
    return _stores[-1]


def shared_store(rank: int) -> Any:
    """Returns a store of all ranks, the same at each start; rank 0 serves it."""
    if not _stores:
        address = rendezvous.own_address
        server = rendezvous.open_store(address(), 0, serves=True) if rank == 0 else None
        host, port = share((server.host, server.port) if server else None)
        _stores.append(server or rendezvous.open_store(host, port, serves=False))
    return _stores[0]


def _skip_in_graphs() -> None:
    """Lets torch.compile call this package's functions instead of tracing into them."""
    from torch._dynamo import trace_rules

    trace_rules.add(__package__)
