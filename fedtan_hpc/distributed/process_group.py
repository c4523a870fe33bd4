"""The process group: start and stop it, this process's rank in it, and barriers.

Jobs start and stop it; every room that exchanges tensors asks for rank and world size.
"""

import gc
import itertools
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch.distributed as dist

# Functions of this module keep the process group of the time when it loads, and so the group's
# threads after its end.  torch's first optimizer would load it, mostly when there is a group.
import torch.distributed.nn.functional  # noqa: F401

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
_LOOK_SECONDS = 0.05
"""Time between two looks at what rank 0 has reported."""
_start_numbers = itertools.count(1)
_stores: dict[tuple[str, int], Any] = {}
"""The stores of this process by address and port, kept until the process ends.  Where rank 0 serves
one, a rank that is already at its next start may be connected to it."""
_groups: WeakKeyDictionary[Any, dict[tuple[int, int], Group]] = WeakKeyDictionary()
"""This rank's groups of consecutive ranks by size and number, for each process group."""
_client_ranks = [1]
"""Ranks that hold one client together, in the present job."""
_limit: timedelta | None = None
"""The time-out of collectives; torch's default in a process group that the user has started."""
channel: Channel | None = None
"""The channel of the job's current start, or of its last one."""


def begin_job() -> None:
    """Forgets what an earlier job of this process has noted."""
    progress.round, progress.client = 0, None
    _client_ranks[0] = 1


def start(rank: int, world_size: int, backend: str, timeout_seconds: float) -> Channel:
    """Joins the process group at MASTER_ADDR and MASTER_PORT; returns a channel beside it.

    srun and mpirun do not set the two variables: under srun they follow from SLURM's variables,
    and under mpirun rank 0 sends its address by MPI.  The channel is mute until it has a secret.

    A process may start and stop several times, as in a sweep, and torchrun may restart it.  So each
    start uses its own keys of the store, which still holds the addresses of earlier starts.
    """
    global channel, _limit
    begin_job()
    progress.collectives = progress.client_collectives = 0
    rendezvous.use_loopback()
    limit = _limit = timedelta(seconds=_TIMEOUT_FACTOR * timeout_seconds)
    prefix = f"fedtan_hpc/restart{launcher_env.restart_count()}/start{next(_start_numbers)}"
    store = _store(rank, backend, limit)
    if backend == "mpi":
        _mpi().init_process_group(limit)
    else:
        store.set_timeout(limit)
        keys = _c10d.PrefixStore(prefix, store)
        own: dict[str, Any] = {"store": keys, "rank": rank, "world_size": world_size}
        dist.init_process_group(backend, timeout=limit, **own)
    # The channel has its own connection: the process group's may hang.
    patience = timedelta(seconds=_CHANNEL_SECONDS)
    connection = rendezvous.open_store(store.host, store.port, False, patience)
    channel = Channel(_c10d.PrefixStore(f"{prefix}/channel", connection))
    return channel


def _store(rank: int, backend: str, limit: timedelta) -> Any:
    """Returns the store in which the ranks find each other: the launcher's, or rank 0's."""
    has_address = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    by_mpirun = launcher_env.detect().launcher in launcher_env.MPI_LAUNCHERS
    if backend == "mpi" or (by_mpirun and not has_address):
        return _mpi().shared_store(rank)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = rendezvous.master_endpoint()
    endpoint = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if endpoint not in _stores:
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        _stores[endpoint] = rendezvous.open_store(*endpoint, serves, limit)
    return _stores[endpoint]


def _mpi() -> Any:
    """Imports the MPI backend, which only jobs over MPI need."""
    from .mpi import backend

    return backend


def stop() -> None:
    """Leaves the process group once all ranks have come here."""
    barrier()
    gc.collect()  # cycles of the job's objects keep groups of ranks, and so their threads
    dist.destroy_process_group()


def say_reported() -> None:
    """Lets the other ranks know that rank 0 has reported why the job ends."""
    with suppress(RuntimeError):
        if channel is not None and channel.secret:
            channel.write("reported", "yes")
            # The ranks read it before the store ends with this one: torch prints that it is lost.
            time.sleep(6 * _LOOK_SECONDS)


def wait_for_report(seconds: float) -> None:
    """Waits until rank 0 has reported why the job ends, or has ended, but at most ``seconds``."""
    if channel is None:  # the ranks have not met, or have parted
        time.sleep(seconds)
        return
    deadline = time.monotonic() + seconds
    with suppress(RuntimeError):  # the store has ended with rank 0, which serves it
        while time.monotonic() < deadline and not channel.read("reported"):
            time.sleep(_LOOK_SECONDS)


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


def consecutive_groups(size: int, number: int = 0) -> Group:
    """Lets ``size`` consecutive ranks hold clients together; returns their group, or None for one.

    All ranks call it together; the groups are made once for each process group.  Messages of
    groups with different numbers do not wait for each other.
    """
    _client_ranks[0] = size
    if size == 1:
        return None
    known = _groups.setdefault(dist.group.WORLD, {})
    if (size, number) not in known:
        starts = range(0, world_size(), size)
        members = [list(range(start, start + size)) for start in starts]
        groups = [dist.new_group(each, timeout=_limit) for each in members]
        known[size, number] = groups[rank() // size]
    return known[size, number]


def ranks_of_client(member: int) -> list[int]:
    """Returns the ranks that hold clients together with rank ``member``, itself included."""
    size = _client_ranks[0] if is_started() else 1
    begin = member // size * size
    return list(range(begin, begin + size))


def holds_client(group: Group) -> bool:
    """Returns whether ``group`` is one that ``consecutive_groups`` has made."""
    if group is None or not _groups:
        return False
    return any(group is each for each in _groups.get(dist.group.WORLD, {}).values())


def barrier() -> None:
    """Waits until all ranks have come here."""
    if is_started():
        with collective():
            dist.barrier()
