"""The check that all ranks' models have equal names, shapes and dtypes, at their first use.

Ranks pair tensors and layers by name, and a message has no names in it.  ``model_average`` and
``batchnorm.context`` check what they send; ``job.setup`` checks before the first round.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from . import collectives, different_calls, process_group

_TAG = -2.0
"""Stands for messages with structures."""
_MOST_DIFFERENCES = 3
"""Differences that an error names; models may differ in thousands of tensors."""


@dataclass(frozen=True)
class Agreement:
    """The result of a comparison of the ranks' structures."""

    digest: int
    """A number below 2^48 that stands for the structure."""
    numbers: Sequence[Sequence[int]]
    """The numbers that each rank gave, by rank."""


_agreements: WeakKeyDictionary[Any, dict[int, Agreement]] = WeakKeyDictionary()
"""By process group; each structure is compared once."""


def described(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns shape and dtype of each tensor as text, by name."""
    return {
        name: f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in tensors.items()
    }


def difference(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Returns the first tensor by which a network differs from a saved one; empty if none."""
    old, new = described(saved), described(own)
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name, "absent"), new.get(name, "absent")
        if before != now:
            return f"{name} of the network is {now}, and {before} in the checkpoint"
    return ""


def agree(
    what: str,
    call: str,
    structure: Mapping[str, str],
    group: process_group.Group,
    device: torch.device,
    numbers: Sequence[int] = (),
) -> Agreement:
    """Compares ``structure`` with that of the group's other ranks, the first time in one gather.

    Args:
        what: what is compared, for the error.
        call: the place of the program, for the error of ranks at different calls.
        structure: a description of each tensor or layer, by name.
        group: the ranks; None for all.
        device: where the backend of the group takes tensors.
        numbers: whole numbers that the ranks exchange with it.

    Raises ``ValueError`` on every rank, with the names that differ.
    """
    text = "\n".join([what, *(f"{name}: {value}" for name, value in sorted(structure.items()))])
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    if process_group.world_size(group) == 1:
        return Agreement(digest, [list(numbers)])
    known = _agreements.setdefault(group or dist.group.WORLD, {})
    if digest not in known:
        rows = _gather([digest, *numbers], call, group, device)
        if any(row[0] != digest for row in rows):
            structures = collectives.all_gather_object(structure, group)
            raise ValueError(_differences(what, structures, process_group.ranks(group)))
        known[digest] = Agreement(digest, [row[1:] for row in rows])
    return known[digest]


def _gather(
    numbers: Sequence[int], call: str, group: process_group.Group, device: torch.device
) -> list[list[int]]:
    """Returns the numbers of all ranks, below 2^53, by rank.

    A sum is what ranks at other calls also take part in, so that it does not wait for them.
    """
    ranks, rank = process_group.world_size(group), process_group.rank(group)
    message = torch.zeros(2 + ranks * len(numbers), dtype=torch.float64, device="cpu")
    message[:2] = torch.tensor([_TAG, _TAG**2])
    rows = message[2:].view(ranks, -1)
    rows[rank] = torch.tensor(numbers, dtype=torch.float64)
    total = collectives.to_cpu(collectives.sum_at(call, message.to(device), group))
    different_calls.check_tag(total[:2].tolist(), _TAG, call, group)
    return [[int(number) for number in row] for row in total[2:].view(ranks, -1).tolist()]


def _differences(what: str, structures: Sequence[Mapping[str, str]], ranks: Sequence[int]) -> str:
    first, found = structures[0], list[str]()
    for rank, other in zip(ranks, structures, strict=True):
        for name in sorted(first.keys() | other.keys()):
            mine, theirs = first.get(name, "absent"), other.get(name, "absent")
            if mine != theirs:
                found.append(f"{name} is {theirs} on rank {rank} and {mine} on rank {ranks[0]}")
    shown = "; ".join(found[:_MOST_DIFFERENCES])
    more = len(found) - _MOST_DIFFERENCES
    return f"the ranks' {what} differ: {shown}{f'; and {more} more' if more > 0 else ''}"
