"""The error of ranks that meet in a collective from different places of the program.

``collectives``, ``model_average`` and ``batchnorm.statistics_call`` raise it.  Their messages show
that something is wrong, but not what the other ranks do.  So each rank writes its place into the
store of the process group, without collectives, and reads those of the others.
"""

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..config.errors import printable
from . import process_group
from .channel import Channel

_PATIENCE = timedelta(seconds=2)
"""How long a rank waits for the places of the others; those that wait elsewhere never write."""
_MOST_CHARACTERS = 300
"""Longest name of a call that is cited."""
_SIGNS = ("preamble.length", "MPI_ERR_TRUNCATE")
"""Parts of gloo's and MPI's errors about messages of different lengths."""
ON_ONE_RANK = (
    "the clients of one rank are at different layers: all must run the same layers in the same "
    "order, all eagerly or all compiled"
)
_errors = [0]
"""Number of such errors in this process; a process may go on after one."""
_c10d: Any = dist


def are_meant(error: BaseException) -> bool:
    """Returns whether a collective failed because the ranks' messages have different lengths."""
    return any(sign in str(error) for sign in _SIGNS)


def check_tag(header: Sequence[float], tag: float, call: str, group: process_group.Group) -> None:
    """Raises ``RuntimeError`` unless all ranks have sent the numbers ``tag`` and its square.

    ``header`` is the sum of the messages of all ranks, which are at ``call``.
    """
    ranks = process_group.world_size(group)
    if not have_tag(header, tag, ranks):
        one_rank = RuntimeError(f"{call}: {ON_ONE_RANK}")
        raise one_rank if ranks == 1 else different_calls(call, group)


def have_tag(header: Sequence[float], tag: float, ranks: int) -> bool:
    """Returns whether all messages in a sum have ``tag``: then its squares sum to R tag^2."""
    return list(header[:2]) == [ranks * tag, ranks * tag**2]


def different_calls(call: str, group: process_group.Group = None) -> RuntimeError:
    """Returns the error, with this rank's ``call`` and those of the group's other ranks."""
    rank, channel = dist.get_rank(), _channel()
    with suppress(RuntimeError):  # the rank that serves the store may have ended
        channel.write(_key(rank), call)
    places = [f"rank {rank} at {call}"]
    for other in process_group.ranks(group):
        if other != rank:
            places.append(f"rank {other} at {_place(channel, other)}")
    _errors[0] += 1
    return RuntimeError(f"the ranks are at different calls: {', '.join(places)}")


def left_by_another(group: process_group.Group = None) -> bool:
    """Returns whether another rank of the group has found that the ranks are at different calls.

    The answer is no if the store has ended with the rank that serves it: that rank is lost.
    """
    channel = _channel()
    others = [_key(rank) for rank in process_group.ranks(group) if rank != dist.get_rank()]
    with suppress(RuntimeError):
        return any(channel.read(key) is not None for key in others)
    return False


def _channel() -> Channel:
    """Returns a channel through the store of the process group.

    In a loop without a job the ranks have no secret; what is read there only names calls.
    """
    job = process_group.channel
    secret = job.secret if job is not None else ""
    return Channel(_c10d.distributed_c10d._get_default_store(), secret or "fedtan_hpc")


def _place(channel: Channel, rank: int) -> str:
    text: str | None = None
    with suppress(RuntimeError):
        text = channel.wait(_key(rank), _PATIENCE)
    if text is None:
        return "an unknown call"
    return printable(text, _MOST_CHARACTERS)


def _key(rank: int) -> str:
    return f"fedtan_hpc/different_calls/{_errors[0]}/{rank}"
