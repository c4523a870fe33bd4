"""Collectives: sums, maxima, gathers and broadcasts over ranks, with what they cost.

Every room that exchanges tensors calls these.  In a single process without a process group each
function returns what one rank alone would receive.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import collective_timer, different_calls
from .counters import MAX_EXCHANGE_BYTES, collective, training_traffic, waiting
from .process_group import Group, holds_client, is_started, world_size


def sum_for_training(
    message: Tensor,
    group: Group = None,
    *,
    of_models: bool = False,
    is_payload: bool = True,
    call: str = "another call",
) -> Tensor:
    """Sums ``message`` over the ranks in place, as one counted collective; same bits everywhere.

    By default ``message`` holds BN statistics.  With ``of_models`` it holds models, gradients or
    private states, and its time counts as that of averaging.  ``is_payload=False`` is for tensors
    that only move between ranks: they do not count as payload.

    Raises ``RuntimeError`` with ``call``, this place of the program, and those of the other ranks,
    if the ranks' messages have different lengths.
    """
    traffic = training_traffic
    if holds_client(group):
        return sum_for_client(message, group, call)
    if is_payload:
        traffic.payload_messages += 1
        traffic.payload_bytes += message.nbytes
    if is_started():
        traffic.messages += 1
        traffic.bytes += message.nbytes
        with collective_timer.timed(message.device, partial(traffic.add_seconds, of_models)):
            sum_at(call, message, group)
    return message


def sum_for_client(message: Tensor, group: Group, call: str = "another call") -> Tensor:
    """Sums ``message`` in place over the ranks that hold one client; it is counted apart."""
    _count_for_client(message)
    with collective_timer.timed(message.device, training_traffic.add_client_seconds):
        sum_at(call, message, group)
    return message


def start_sum_for_client(message: Tensor, group: Group, call: str) -> Callable[[], None]:
    """Starts a sum over the ranks that hold one client; returns a function that waits for it.

    On a GPU the stream waits.  All ranks of the group start their sums in the same order.  The time
    of waiting is counted.
    """
    _count_for_client(message)
    with _naming(call, group):
        work = dist.all_reduce(message, group=group, async_op=True)

    def wait() -> None:
        timed = collective_timer.timed(message.device, training_traffic.add_client_seconds)
        with timed, _naming(call, group):
            _join(work.wait, of_client=True)

    return wait


def _count_for_client(message: Tensor) -> None:
    training_traffic.client_messages += 1
    training_traffic.client_bytes += message.nbytes


def sum_at(call: str, message: Tensor, group: Group) -> Tensor:
    """Sums ``message`` over the ranks in place, uncounted; errors name the place ``call``."""
    with _naming(call, group):
        _join(_sum, message, group, of_client=holds_client(group))
    return message


@contextmanager
def _naming(call: str, group: Group) -> Iterator[None]:
    """Lets errors of a collective of ``group`` name the place ``call``."""
    try:
        yield
    except RuntimeError as error:
        if different_calls.are_meant(error) or different_calls.left_by_another(group):
            raise different_calls.different_calls(call, group) from error
        raise


def _sum(message: Tensor, group: Group = None) -> None:
    """Sums ``message`` over the ranks in place.

    gloo's all-reduce passes a message round a ring, and wakes a thread of each rank at each of its
    2 (W - 1) steps.  A small message goes to all other ranks at once instead, and every rank adds
    what it receives in the same order: one step, and the same bits everywhere.  gloo ends a process
    that receives more than it has room for.  So there is room for any small message: ranks at
    different calls can then see what went wrong, and say so.
    """
    ranks = dist.get_world_size(group)
    is_small = message.nbytes <= MAX_EXCHANGE_BYTES and message.device.type == "cpu"
    if not is_small or ranks == 1 or dist.get_backend(group) != "gloo":
        dist.all_reduce(message, group=group)
        return
    rank, flat = dist.get_rank(group), message.detach().reshape(1, -1)
    size, room = flat.size(1), MAX_EXCHANGE_BYTES // flat.element_size()
    sent, received = [size] * ranks, [room] * ranks
    sent[rank] = received[rank] = 0
    others = flat.new_empty(ranks - 1, room)
    copies = flat.repeat(ranks - 1, 1).view(-1)
    dist.all_to_all_single(others.view(-1), copies, received, sent, group=group)
    rows = torch.cat([others[:rank, :size], flat, others[rank:, :size]])
    message.detach().copy_(rows.sum(0, dtype=message.dtype).view(message.shape))


def _join(
    function: Callable[..., Any], *arguments: Any, of_client: bool = False, **options: Any
) -> None:
    if is_started():
        with collective(of_client=of_client):
            function(*arguments, **options)


def sum_over_ranks(message: Tensor) -> Tensor:
    """Sums ``message`` over all ranks in place, for metrics, evaluation and checks; not counted."""
    _join(_sum, message)
    return message


def sum_as_list(message: Tensor) -> list[float]:
    """Sums the 1-d ``message`` over all ranks in place and returns the values; not counted."""
    return to_cpu(sum_over_ranks(message)).tolist()


def to_cpu(message: Tensor) -> Tensor:
    """Copies the result of a collective to the CPU.

    On a GPU a collective returns at once, and the rank waits for others where it reads the result.
    Here the watchdog sees that it waits.
    """
    with waiting():
        return message.cpu()


def max_over_ranks(message: Tensor) -> Tensor:
    """Takes the element-wise maximum of ``message`` over all ranks, in place; not counted."""
    _join(dist.all_reduce, message, op=dist.ReduceOp.MAX)
    return message


def all_gather(message: Tensor) -> list[Tensor]:
    """Returns the ``message`` of every rank, by rank; all messages have one shape."""
    gathered = [message.clone() for _ in range(world_size())]
    _join(dist.all_gather, gathered, message)
    return gathered


def all_gather_object(value: Any, group: Group = None) -> list[Any]:
    """Returns the ``value`` of every rank of ``group``."""
    gathered = [value] * world_size(group)
    _join(dist.all_gather_object, gathered, value, group=group)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Returns the ``value`` of rank 0 on every rank."""
    box = [value]
    _join(dist.broadcast_object_list, box, src=0)
    return box[0]


def broadcast_tensors(tensors: list[Tensor]) -> None:
    """Overwrites ``tensors`` on every rank with those of rank 0."""
    for tensor in tensors:
        _join(dist.broadcast, tensor.detach(), src=0)
