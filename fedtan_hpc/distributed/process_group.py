"""Joining and leaving the process group, and this process's place in it."""

from __future__ import annotations

import itertools
import os
import socket
import sys
from datetime import timedelta
from typing import Any, TypeAlias

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..runtime import launcher_env
from . import rendezvous as slurm
from .channel import Channel
from .counters import joining, progress

Group: TypeAlias = dist.ProcessGroup | None


_starts = itertools.count(1)


_SLACK = 1.5
"""A collective's own time-out over that of the watchdog, which names the rank that is missing."""


_ANSWER_SECONDS = 30.0


_served: list[Any] = []
"""Rank 0's stores of channels over MPI; each ends with its object, which goes when ranks stop."""


_first: list[Any] = []
"""The first store of this process, kept until it ends: where rank 0 serves it, a rank that is
already at its next start may be connected to it, and later stores share its server."""


def start(rank: int, world_size: int, backend: str, timeout_seconds: float) -> Channel:
    """Join the process group that the launcher's MASTER_ADDR and MASTER_PORT describe.

    srun and mpirun set neither: SLURM knows the first node, and over MPI (backend mpi) none is
    needed; for the others rank 0 names a place by MPI.  A process may start and stop several times,
    as a sweep does, and torchrun may restart it: each start has keys of its own in the store, where
    the addresses of the last one still stand.  Returns a channel beside the collectives.
    """
    progress.round = progress.joined = 0
    limit = timedelta(seconds=_SLACK * timeout_seconds)
    if backend == "mpi":
        _mpi().init_process_group()
        return _channel(_mpi().share(_free_place() if rank == 0 else None), serves=rank == 0)
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        place = _free_place() if _is_by_mpirun() and rank == 0 else None
        place = _mpi().share(place) if _is_by_mpirun() else slurm.meeting_place()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=limit))
    if not _first:
        _first.append(store)
    prefix = f"fedtan_hpc/restart{launcher_env.restarts()}/start{next(_starts)}"
    own_keys = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
    dist.init_process_group(
        backend, store=own_keys, rank=rank, world_size=world_size, timeout=limit
    )
    return _channel((os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]), prefix)


def _channel(place: tuple[str, str], prefix: str = "fedtan_hpc", serves: bool = False) -> Channel:
    """A connection to the store at ``place``, or, on the rank that ``serves``, the store itself."""
    c10d: Any = dist
    how = {"wait_for_workers": False, "timeout": timedelta(seconds=_ANSWER_SECONDS)}
    host, port = place[0], int(place[1])
    if serves:
        _served.append(c10d.TCPStore(host, port, is_master=True, **how))
    own = c10d.TCPStore(host, port, is_master=False, **how)
    return Channel(c10d.PrefixStore(f"{prefix}/channel", own))


def _is_by_mpirun() -> bool:
    return launcher_env.detect().launcher in launcher_env.MPI_LAUNCHERS


def _mpi() -> Any:
    """The module that loads MPI, which only jobs that need it do."""
    from .mpi import backend

    return backend


def _free_place() -> tuple[str, str]:
    """An address of this host that others reach, and a port that is free."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    return _own_address(), port


def _own_address() -> str:
    """By which other hosts reach this one: that of its way out, else its name's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way_out:
        try:
            way_out.connect(("192.0.2.1", 9))  # an address for documentation; nothing is sent
            return str(way_out.getsockname()[0])
        except OSError:
            return socket.gethostbyname(socket.gethostname())


def stop() -> None:
    """Leave the process group once all ranks are here."""
    barrier()
    dist.destroy_process_group()
    _served.clear()


def end_job(code: int) -> None:
    """End all processes of a job under MPI, which would hang on one that is gone."""
    if mpi := sys.modules.get(f"{__package__}.mpi.backend"):
        mpi.abort(code)


def has_lost_a_rank(error: BaseException) -> bool:
    """Whether a collective failed with ``error`` because another rank's process is gone."""
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "remote process exited or there was a network error",  # NCCL
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def is_started() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank(group: Group = None) -> int:
    """This process's number in the group, from 0."""
    return dist.get_rank(group) if is_started() else 0


def world_size(group: Group = None) -> int:
    """Number of processes in the group."""
    return dist.get_world_size(group) if is_started() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if is_started():
        with joining():
            dist.barrier()
