"""The process group: start and stop it, this process's rank in it, and barriers.

Jobs start and stop it; every room that exchanges tensors asks for rank and world size.
"""

import itertools
import os
import sys
from datetime import timedelta
from typing import Any, TypeAlias

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from ..config.errors import RunError
from ..runtime import launcher_env
from . import rendezvous
from .channel import Channel
from .counters import collective, progress

Group: TypeAlias = dist.ProcessGroup | None

_c10d: Any = dist
_TIMEOUT_FACTOR = 1.5
"""Time-out of a collective over that of the watchdog, which must name the missing rank first."""
_CHANNEL_SECONDS = 30.0
"""Time-out of a call of the channel."""
_start_numbers = itertools.count(1)
_channel_servers: list[Any] = []
"""Stores that rank 0 serves for channels over MPI; a server ends with its object."""
_first_store: list[Any] = []
"""The first store of this process, kept until the process ends.  Where rank 0 serves it, later
stores share its server, and a rank that is already at its next start may be connected to it."""


def start(rank: int, world_size: int, backend: str, timeout_seconds: float) -> Channel:
    """Joins the process group at MASTER_ADDR and MASTER_PORT; returns a channel beside it.

    srun and mpirun do not set the two variables: under srun they follow from SLURM's variables,
    and under mpirun rank 0 sends its address by MPI.  The backend mpi needs no address.

    A process may start and stop several times, as in a sweep, and torchrun may restart it.  So each
    start uses its own keys of the store, which still holds the addresses of earlier starts.
    """
    progress.round = progress.collectives = 0
    limit = timedelta(seconds=_TIMEOUT_FACTOR * timeout_seconds)
    if backend == "mpi":
        _mpi().init_process_group(limit)
        return _open_channel(_rank_0_endpoint(rank), "fedtan_hpc", serves=rank == 0)
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        by_mpirun = launcher_env.detect().launcher in launcher_env.MPI_LAUNCHERS
        endpoint = _rank_0_endpoint(rank) if by_mpirun else rendezvous.master_endpoint()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = endpoint
    store, _, _ = next(torch_rendezvous("env://", rank, world_size, timeout=limit))
    if not _first_store:
        _first_store.append(store)
    prefix = f"fedtan_hpc/restart{launcher_env.restart_count()}/start{next(_start_numbers)}"
    keys = _c10d.PrefixStore(prefix, store)
    dist.init_process_group(backend, store=keys, rank=rank, world_size=world_size, timeout=limit)
    return _open_channel((os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]), prefix)


def _open_channel(endpoint: tuple[str, str], prefix: str, serves: bool = False) -> Channel:
    """Connects to the store at ``endpoint``; the rank that ``serves`` starts it first."""
    options = {"wait_for_workers": False, "timeout": timedelta(seconds=_CHANNEL_SECONDS)}
    host, port = endpoint[0], int(endpoint[1])
    if serves:
        _channel_servers.append(_c10d.TCPStore(host, port, is_master=True, **options))
    # The channel has its own connection: the process group's may hang.
    store = _c10d.TCPStore(host, port, is_master=False, **options)
    return Channel(_c10d.PrefixStore(f"{prefix}/channel", store))


def _rank_0_endpoint(rank: int) -> tuple[str, str]:
    endpoint: tuple[str, str] = _mpi().share(rendezvous.free_endpoint() if rank == 0 else None)
    return endpoint


def _mpi() -> Any:
    """Imports the MPI backend, which only jobs over MPI need."""
    from .mpi import backend

    return backend


def stop() -> None:
    """Leaves the process group once all ranks have come here."""
    barrier()
    dist.destroy_process_group()
    _channel_servers.clear()


def end_job(code: int) -> None:
    """Ends all processes of a job over MPI; without this they would wait for this one."""
    if library := sys.modules.get(f"{__package__}.mpi.library"):
        library.abort(code)


class LostRankError(RunError):
    """Another rank has ended, so this one cannot go on."""


def is_lost_rank_error(error: BaseException) -> bool:
    """Returns whether a collective failed because another rank's process has ended."""
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "remote process exited or there was a network error",  # NCCL
    )
    if isinstance(error, RunError):  # its message may cite an error of another network
        return isinstance(error, LostRankError)
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def is_started() -> bool:
    """Returns whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank(group: Group = None) -> int:
    """Returns this process's rank in ``group``, from 0; 0 without a process group."""
    return dist.get_rank(group) if is_started() else 0


def world_size(group: Group = None) -> int:
    """Returns the number of ranks in ``group``; 1 without a process group."""
    return dist.get_world_size(group) if is_started() else 1


def ranks(group: Group = None) -> list[int]:
    """Returns the global ranks in ``group``; only 0 without a process group."""
    return dist.get_process_group_ranks(group or dist.group.WORLD) if is_started() else [0]


def barrier() -> None:
    """Waits until all ranks have come here."""
    if is_started():
        with collective():
            dist.barrier()
