"""The only user of torch.distributed: start and stop, sums over ranks, and what they cost.

A group is a ``torch.distributed`` process group, or None for all ranks.  Without an initialised
process group there is one client, and every sum over ranks is the value itself.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

Group: TypeAlias = dist.ProcessGroup | None


@dataclass
class Traffic:
    """Collectives that training needs (statistics and model averages), counted on this rank."""

    messages: int = 0
    """Collective calls."""
    bytes: int = 0
    """Payload that this rank put into them, in bytes."""
    sums: int = 0
    payload: int = 0
    """The same two, counted in a single process too, which has nobody to send anything to."""

    def since(self, earlier: Traffic) -> Traffic:
        """What was added after ``earlier`` was copied from this counter."""
        return Traffic(
            self.messages - earlier.messages,
            self.bytes - earlier.bytes,
            self.sums - earlier.sums,
            self.payload - earlier.payload,
        )

    def copy(self) -> Traffic:
        """The present count, which does not move on."""
        return Traffic(self.messages, self.bytes, self.sums, self.payload)


training_traffic = Traffic()


_starts = itertools.count(1)


def start(rank: int, world_size: int, backend: str, timeout_seconds: float) -> None:
    """Join the process group that the launcher's MASTER_ADDR and MASTER_PORT describe.

    mpirun sets neither: over MPI (backend mpi) none is needed, and for the others rank 0 names a
    place by MPI.  A process may start and stop several times, as a sweep does: each start has keys
    of its own in the launcher's store, where the addresses of the last one still stand.
    """
    if backend == "mpi":
        _mpi().init_process_group()
        return
    if "MASTER_ADDR" not in os.environ:
        place = _mpi().share(_free_place() if rank == 0 else None)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place
    timeout = timedelta(seconds=timeout_seconds)
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    store = dist.PrefixStore(  # type: ignore[attr-defined]
        f"fedtan_hpc/start{next(_starts)}", store
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _mpi() -> Any:
    """The module that loads MPI, which only jobs that need it do."""
    from . import mpi

    return mpi


def _free_place() -> tuple[str, str]:
    """An address of this host that others reach, and a port that is free."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    return socket.gethostbyname(socket.gethostname()), port


def stop() -> None:
    """Leave the process group once all ranks are here."""
    barrier()
    dist.destroy_process_group()


def end_job(code: int) -> None:
    """End all processes of a job under MPI, which would hang on one that is gone."""
    if mpi := sys.modules.get(f"{__package__}.mpi"):
        mpi.abort(code)


def is_started() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank(group: Group = None) -> int:
    """This process's number in the group, from 0."""
    return dist.get_rank(group) if is_started() else 0


def world_size(group: Group = None) -> int:
    """Number of processes in the group."""
    return dist.get_world_size(group) if is_started() else 1


def sum_for_training(message: Tensor, group: Group = None) -> Tensor:
    """Sum ``message`` over the ranks in place, as one counted collective; same bits everywhere."""
    training_traffic.sums += 1
    training_traffic.payload += message.nbytes
    if is_started():
        dist.all_reduce(message, group=group)
        training_traffic.messages += 1
        training_traffic.bytes += message.nbytes
    return message


def sum_for_moving(message: Tensor) -> Tensor:
    """The same for what only moves from rank to rank: it is no payload of the algorithm."""
    before = training_traffic.copy()
    sum_for_training(message)
    training_traffic.sums, training_traffic.payload = before.sums, before.payload
    return message


def sum_over_ranks(message: Tensor) -> Tensor:
    """Sum ``message`` over all ranks in place: metrics, evaluation and checks; not counted."""
    if is_started():
        dist.all_reduce(message)
    return message


def max_over_ranks(message: Tensor) -> Tensor:
    """The largest of the ranks' ``message``, element by element, in place; not counted."""
    if is_started():
        dist.all_reduce(message, op=dist.ReduceOp.MAX)
    return message


def all_gather(message: Tensor) -> list[Tensor]:
    """The ranks' ``message`` tensors (one shape), by rank; for reports, not in a hot path."""
    if not is_started():
        return [message]
    gathered = [torch.empty_like(message) for _ in range(world_size())]
    dist.all_gather(gathered, message)
    return gathered


def all_gather_object(value: Any) -> list[Any]:
    """The ranks' ``value``, by rank, on every rank."""
    gathered = [value] * world_size()
    if is_started():
        dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` on every rank."""
    box = [value]
    if is_started():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensors(tensors: list[Tensor]) -> None:
    """Overwrite every rank's ``tensors`` with rank 0's."""
    if is_started():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def barrier() -> None:
    """Wait for all ranks."""
    if is_started():
        dist.barrier()
