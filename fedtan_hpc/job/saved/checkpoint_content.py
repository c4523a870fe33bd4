"""Checks that a checkpoint means what a run writes: kind, shape and sense of every part.

A digest only finds accidents.  Here a file also fails that somebody has written by hand, or whose
parts belong to other rounds.  ``resume`` calls this when it chooses a checkpoint, before anything
is done with it; whether tensors fit the network, ``Cohort.state_misfit`` says later.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.reading import FileError
from ...files.typed_values import fits
from .. import checkpoint_format
from .options import checked

_SECONDS = 2**40
"""More seconds than any run takes."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def misfit(path: Path, content: Mapping[str, Any]) -> str:
    """Returns what is wrong with the ``content`` of the checkpoint ``path``; empty if nothing.

    The rest of the package may then use all parts without a look at their types.
    """
    for name, (is_right, kind) in _PARTS.items():
        if name not in content:
            return f"it has no {name}"
        if not is_right(content[name]):
            return f"its {name} is {repr(content[name])[:80]}, not {kind}"
    if ("optimizer" in content) == ("momentum" in content):
        return "it has no optimizer"
    if not (_is_state(content.get("optimizer", {})) and _are_tensors(content.get("momentum", []))):
        return "its optimizer has other things than tensors by name"
    try:
        options = checked(content["config"], path)
    except FileError as error:
        return f"its config is none ({error})"
    return _round_misfit(path, content, options) or _shards_misfit(content, options)


def _round_misfit(path: Path, content: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    number, in_name = content["round"], checkpoint_format.round_of(path)
    if in_name not in (0, number):
        return f"its round is {number}, and its name says {in_name}"
    if number > (rounds := options["rounds"]):
        return f"its round is {number}, and its run has {rounds}"
    if any(not 0 < each <= number for each in content["resumed_after"]):
        return f"its resumed_after is {content['resumed_after']!r:.80}, not rounds until {number}"
    return ""


def _shards_misfit(content: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Returns what is wrong with the names of the shards, which must not lead elsewhere."""
    number, owners, shards = content["round"], content["owners"], content["shards"]
    for rank, digests in enumerate(shards):
        for index, (name, digest) in enumerate(digests.items()):
            path = checkpoint_format.path_of(Path(), number)
            if name != checkpoint_format.shard_of(path, rank, index).name:
                return f"its shard {name!r:.80} is not one of round {number} and rank {rank}"
            if not _DIGEST.fullmatch(digest):
                return f"the digest of its shard {name} is none"
    if wrong := [client for client, rank in owners.items() if rank >= len(shards)]:
        return f"its shards are none of rank {owners[wrong[0]]}, the owner of client {wrong[0]}"
    clients = options["clients"]
    if wrong := [client for client in owners if client >= clients]:
        return f"its owners have client {wrong[0]}, and its run has {clients} clients"
    return ""


def shards_misfit(path: Path, content: Mapping[str, Any]) -> str:
    """Reads the shards of the checkpoint ``path`` one by one; returns what is wrong with them.

    Raises as ``checkpoint_format.read``.
    """
    for rank, digests in enumerate(content["shards"]):
        expected = {client for client, owner in content["owners"].items() if owner == rank}
        for name, digest in digests.items():
            for shard in checkpoint_format.read_shards(path, {name: digest}):
                if why := _shard_misfit(shard, expected):
                    return f"{path.parent / name}: {why}"
                expected -= set(shard["clients"])
                del shard  # before the next one is read
        if expected:
            return f"{path}: its shards lack the state of client {min(expected)}"
    return ""


def _shard_misfit(shard: Mapping[str, Any], expected: set[int]) -> str:
    clients, states = shard.get("clients"), shard.get("states")
    if not fits(clients, list[int]) or not clients:
        return f"its clients are {repr(clients)[:80]}, not a list of numbers"
    if not isinstance(states, Tensor) or states.dim() != 2 or not states.is_floating_point():
        return "its states are no matrix of floating-point values"
    if len(states) != len(clients):
        return f"it has {len(clients)} clients and {len(states)} states"
    if set(clients) - expected or len(set(clients)) < len(clients):
        return f"its clients are {clients!r:.80}, and its rank has {sorted(expected)!r:.80}"
    return ""


def _is_generator(value: Any) -> bool:
    """Returns whether ``value`` has the state of torch's generator of random numbers."""
    if not (isinstance(value, list) and len(value) == 1 and isinstance(value[0], Tensor)):
        return False
    try:
        torch.Generator().set_state(value[0])
    except (RuntimeError, TypeError):
        return False
    return True


def _is_model(value: Any) -> bool:
    return fits(value, dict[str, Tensor]) and bool(value)


def _is_state(value: Any) -> bool:
    return fits(value, dict[str, dict[str, Tensor]])


def _are_tensors(value: Any) -> bool:
    return fits(value, list[Tensor])


def _is_server(value: Any) -> bool:
    return _are_tensors(value) and len(value) == 2 and all(t.is_floating_point() for t in value)


_PARTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "round": (lambda value: fits(value, int) and value > 0, "the number of a round"),
    "seconds": (lambda value: fits(value, float) and 0 <= value < _SECONDS, "a time"),
    "rng": (_is_generator, "the state of a generator"),
    "config": (lambda value: isinstance(value, dict), "the options of a run"),
    "resumed_after": (lambda value: fits(value, list[int]), "a list of rounds"),
    "owners": (lambda value: fits(value, dict[int, int]), "ranks by client"),
    "shards": (lambda value: fits(value, list[dict[str, str]]), "digests by file name"),
    "model": (_is_model, "tensors by name"),
    "server": (_is_server, "two tensors"),
}
"""What every checkpoint has, with its test."""
