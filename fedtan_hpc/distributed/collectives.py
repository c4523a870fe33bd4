"""Collectives: sums over ranks, gathers and broadcasts, and what they cost."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import collective_timer
from .counters import EXCHANGED, joining, training_traffic, waiting
from .process_group import Group, is_started, rank, world_size


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
        with collective_timer.timed(message.device, add), joining():
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
        with joining():
            _add(message)
    return message


def values_of_sum(message: Tensor) -> list[float]:
    """The sum of a 1-d ``message`` over all ranks."""
    return to_cpu(sum_over_ranks(message)).tolist()


def to_cpu(message: Tensor) -> Tensor:
    """What collectives have left, on the CPU.

    On a GPU they return at once, and a rank waits where it reads: here a watchdog sees that it
    does.
    """
    with waiting():
        return message.cpu()


def max_over_ranks(message: Tensor) -> Tensor:
    """The largest of the ranks' ``message``, element by element, in place; not counted."""
    if is_started():
        with joining():
            dist.all_reduce(message, op=dist.ReduceOp.MAX)
    return message


def all_gather(message: Tensor) -> list[Tensor]:
    """The ranks' ``message`` tensors (one shape), by rank; for reports, not in a hot path."""
    if not is_started():
        return [message]
    gathered = [torch.empty_like(message) for _ in range(world_size())]
    with joining():
        dist.all_gather(gathered, message)
    return gathered


def all_gather_object(value: Any) -> list[Any]:
    """The ranks' ``value``, by rank, on every rank."""
    gathered = [value] * world_size()
    if is_started():
        with joining():
            dist.all_gather_object(gathered, value)
    return gathered


def gather_to_first(message: Tensor) -> list[Tensor]:
    """The ranks' ``message`` tensors (one shape), by rank, on rank 0; empty on the others."""
    if not is_started():
        return [message]
    gathered = [torch.empty_like(message) for _ in range(world_size())] if rank() == 0 else []
    with joining():
        dist.gather(message, gathered if rank() == 0 else None, dst=0)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` on every rank."""
    box = [value]
    if is_started():
        with joining():
            dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensors(tensors: list[Tensor]) -> None:
    """Overwrite every rank's ``tensors`` with rank 0's."""
    if is_started():
        for tensor in tensors:
            with joining():
                dist.broadcast(tensor.detach(), src=0)
