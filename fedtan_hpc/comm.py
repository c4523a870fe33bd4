"""The only user of torch.distributed: start and stop, sums over ranks, and what they cost.

A group is a ``torch.distributed`` process group, or None for all ranks.  Without an initialised
process group there is one client, and every sum over ranks is the value itself.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from . import environment, slurm, stopwatch
from .channel import Channel
from .traffic import EXCHANGED, Progress, Traffic

Group: TypeAlias = dist.ProcessGroup | None


training_traffic = Traffic()
progress = Progress()


@contextmanager
def _waiting() -> Iterator[None]:
    progress.waiting_since = time.monotonic()
    try:
        yield
    finally:
        progress.waiting_since = None


@contextmanager
def _joining() -> Iterator[None]:
    progress.joined += 1
    with _waiting():
        yield


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
    prefix = f"fedtan_hpc/restart{environment.restarts()}/start{next(_starts)}"
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
    return environment.detect().launcher in environment.MPI_LAUNCHERS


def _mpi() -> Any:
    """The module that loads MPI, which only jobs that need it do."""
    from . import mpi

    return mpi


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
    if mpi := sys.modules.get(f"{__package__}.mpi"):
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


def sum_for_training(message: Tensor, group: Group = None, of_models: bool = False) -> Tensor:
    """Sum ``message`` over the ranks in place, as one counted collective; same bits everywhere.

    It holds statistics, or what ``of_models`` is sent once a step or round.
    """
    training_traffic.sums += 1
    training_traffic.payload += message.nbytes
    if is_started():
        training_traffic.messages += 1
        training_traffic.bytes += message.nbytes
        add = training_traffic.add_to_average if of_models else training_traffic.add_to_statistics
        with stopwatch.timed(message.device, add), _joining():
            _add(message, group)
    return message


def _add(message: Tensor, group: Group = None) -> None:
    """Sum over the ranks in place.

    gloo's all-reduce passes a message round a ring, and wakes a thread of each rank at every one of
    its 2 (W - 1) steps.  Small messages go to all others at once, and every rank adds what it has
    got, in the same order: one step, and the same bits everywhere.
    """
    ranks = dist.get_world_size(group)
    is_small = message.nbytes <= EXCHANGED and message.device.type == "cpu"
    if not is_small or ranks == 1 or dist.get_backend(group) != "gloo":
        dist.all_reduce(message, group=group)
        return
    own = message.detach()
    sent = own.reshape(-1).repeat(ranks)
    of_all = torch.empty_like(sent)
    dist.all_to_all_single(of_all, sent, group=group)
    torch.sum(of_all.view(ranks, *own.shape), 0, dtype=own.dtype, out=own)


def sum_for_moving(message: Tensor) -> Tensor:
    """The same for what only moves from rank to rank: it is no payload of the algorithm."""
    before = training_traffic.copy()
    sum_for_training(message, of_models=True)
    training_traffic.sums, training_traffic.payload = before.sums, before.payload
    return message


def sum_over_ranks(message: Tensor) -> Tensor:
    """Sum ``message`` over all ranks in place: metrics, evaluation and checks; not counted."""
    if is_started():
        with _joining():
            _add(message)
    return message


def values_of_sum(message: Tensor) -> list[float]:
    """The sum of a 1-d ``message`` over all ranks."""
    return on_host(sum_over_ranks(message)).tolist()


def on_host(message: Tensor) -> Tensor:
    """What collectives have left, on the CPU.

    On a GPU they return at once, and a rank waits where it reads: here a watchdog sees that it
    does.
    """
    with _waiting():
        return message.cpu()


def max_over_ranks(message: Tensor) -> Tensor:
    """The largest of the ranks' ``message``, element by element, in place; not counted."""
    if is_started():
        with _joining():
            dist.all_reduce(message, op=dist.ReduceOp.MAX)
    return message


def all_gather(message: Tensor) -> list[Tensor]:
    """The ranks' ``message`` tensors (one shape), by rank; for reports, not in a hot path."""
    if not is_started():
        return [message]
    gathered = [torch.empty_like(message) for _ in range(world_size())]
    with _joining():
        dist.all_gather(gathered, message)
    return gathered


def all_gather_object(value: Any) -> list[Any]:
    """The ranks' ``value``, by rank, on every rank."""
    gathered = [value] * world_size()
    if is_started():
        with _joining():
            dist.all_gather_object(gathered, value)
    return gathered


def gather_to_first(message: Tensor) -> list[Tensor]:
    """The ranks' ``message`` tensors (one shape), by rank, on rank 0; empty on the others."""
    if not is_started():
        return [message]
    gathered = [torch.empty_like(message) for _ in range(world_size())] if rank() == 0 else []
    with _joining():
        dist.gather(message, gathered if rank() == 0 else None, dst=0)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` on every rank."""
    box = [value]
    if is_started():
        with _joining():
            dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensors(tensors: list[Tensor]) -> None:
    """Overwrite every rank's ``tensors`` with rank 0's."""
    if is_started():
        for tensor in tensors:
            with _joining():
                dist.broadcast(tensor.detach(), src=0)


def barrier() -> None:
    """Wait for all ranks."""
    if is_started():
        with _joining():
            dist.barrier()
