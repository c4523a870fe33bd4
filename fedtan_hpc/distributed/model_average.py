"""Weighted sums of models over the clients of a rank and over the ranks.

``average_model`` and ``average_models`` are for a user's training loop; a job's cohort uses
``ModelSum``.  The names of a model's tensors are here too, for all rooms above.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.transfer import copy_all, send
from . import collectives, different_calls, process_group, structure

_HEADER = 4
"""Values at the front of each message: ``_TAG`` and its square, the sum of the weights, and the
number of bad ones."""
_TAG = -1.0
"""Stands for messages with models; those with BN statistics have tags of 0 and more."""
_CALL = "the average of the models"


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by name, each once, in the order of their names.

    Ranks that have built the model in another order get the same order.  A tensor with several
    names has the first of them.
    """
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in sorted(_by_all_names(module).items()):
        if id(tensor) not in seen:
            tensors[name] = tensor
            seen.add(id(tensor))
    return tensors


def _by_all_names(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def model_tensors(module: nn.Module) -> list[Tensor]:
    """Returns parameters and buffers, each once, in the order of their names."""
    return list(named_tensors(module).values())


Exclude = Collection[str | type[nn.Module]]
"""Classes of layers, and names of layers or tensors with ``*`` for any letters."""
Select = Callable[[nn.Module], Mapping[str, Tensor]]
"""Returns tensors of a module by name; the same names for every copy of the module."""


def average_model(
    module: nn.Module,
    weight: float,
    group: process_group.Group = None,
    exclude: Exclude = (),
) -> None:
    """Sets parameters and floating-point buffers to sum_k p_k value_k over the ranks of ``group``.

    Each rank is one client k, and ``weight`` is its p_k; the weights of all ranks sum to 1.  A rank
    of weight 0 contributes nothing, whatever its values.  Each dtype takes one all-reduce; half
    precision is summed in float32.  Integer buffers stay as they are.

    A DTensor, as FSDP2 makes them, is averaged shard by shard.

    What ``exclude`` names stays as it is, the same on all ranks: classes of layers, and names of
    layers or tensors, with ``*`` for any letters.  ``[FedTANBatchNorm]`` keeps BN layers (FedBN).

    Raises ``ValueError`` on every rank if a weight is negative or not finite, the weights do not
    sum to 1, a part of ``exclude`` matches nothing or all of it everything, or the ranks' tensors
    differ in names, shapes or dtypes (compared at the first use of such a model), and
    ``RuntimeError`` if a rank is at another call; the model is then unchanged.
    """
    average_models([module], [weight], group, exclude)


def average_models(
    modules: Sequence[nn.Module],
    weights: Sequence[float],
    group: process_group.Group = None,
    exclude: Exclude = (),
) -> None:
    """Sets every module of ``modules`` to the weighted mean over all clients of all ranks.

    ``modules`` are the models of the clients on this rank, ``weights`` their p_k, which sum to 1
    over all ranks.  A rank without a client passes one module with weight 0.  Tensors, messages and
    errors are those of ``average_model``.
    """
    if not len(modules) == len(weights) >= 1:
        raise ValueError("modules and weights must be equally many, and at least one")
    kept = _excluded(modules[0], exclude)

    def select(module: nn.Module) -> dict[str, Tensor]:
        return {name: each for name, each in named_tensors(module).items() if name not in kept}

    tensors = _averaged_tensors(select(modules[0]))
    if kept and not tensors:
        raise ValueError(f"exclude={[*exclude]} leaves nothing to average")
    _check_shards(tensors, group)
    if tensors:
        device = next(iter(tensors.values())).device
        structure.agree("models", _CALL, structure.described(tensors), group, device)
    total = ModelSum(modules[0], select=select)
    for module, weight in zip(modules, weights, strict=True):
        total.add(module, weight)
    total.all_reduce(group)
    for module in modules:
        total.copy_to(module)


class ModelSum:
    """The sum of p_k times a model's floating-point tensors, in one flat message per dtype.

    ``select`` names the tensors of ``module`` that take part; by default all do.  With ``counters``
    the first message also carries BN's ``num_batches_tracked``, exact up to 2^24.  All clients that
    train have equal counters, and this is how a rank without a client receives them.
    """

    def __init__(
        self, module: nn.Module, counters: bool = False, select: Select = named_tensors
    ) -> None:
        self._counters = counters
        self._select = select
        self._weight, self._bad_weights = 0.0, 0
        self._messages = [
            torch.zeros(
                _HEADER + sum(tensor.numel() for tensor in tensors),
                dtype=torch.promote_types(tensors[0].dtype, torch.float32),
                device=tensors[0].device,
            )
            for tensors in self._groups(module)
        ]

    @torch.no_grad()
    def add(self, module: nn.Module, weight: float) -> None:
        """Adds ``weight`` times the values of ``module``; nothing if the weight is 0 or bad."""
        weight = float(weight)
        valid = math.isfinite(weight) and weight >= 0
        self._weight += weight if valid else 0.0
        self._bad_weights += not valid
        if not valid or weight == 0 or weight > 2:  # more than 1 fails the check anyway
            return
        for message, tensors in zip(self._messages, self._groups(module), strict=True):
            values = torch.cat([tensor.reshape(-1).to(message.dtype) for tensor in tensors])
            message[_HEADER:].add_(values, alpha=weight)

    def all_reduce(self, group: process_group.Group = None) -> None:
        """Adds up the sums of all ranks, in one collective per dtype.

        A DTensor, as FSDP2 makes them, is averaged shard by shard.

        Raises ``ValueError`` on every rank if a weight is negative or not finite, or the weights
        of all ranks do not sum to 1.
        """
        for message in self._messages:
            numbers = _TAG, _TAG**2, self._weight, self._bad_weights
            header = torch.tensor(numbers, dtype=message.dtype, device="cpu")
            message[:_HEADER] = send(header, message.device)
            collectives.sum_for_training(message, group, of_models=True, call=_CALL)
        for message in self._messages:
            _check_header(collectives.to_cpu(message[:_HEADER]), group)

    def copy_to(self, module: nn.Module) -> None:
        """Overwrites the tensors of ``module`` with the summed values."""
        for message, tensors in zip(self._messages, self._groups(module), strict=True):
            parts = torch.split(message[_HEADER:], [tensor.numel() for tensor in tensors])
            values = [
                (part if tensor.is_floating_point() else part.round()).view(tensor.shape)
                for tensor, part in zip(tensors, parts, strict=True)
            ]
            copy_all(tensors, values)

    def _groups(self, module: nn.Module) -> list[list[Tensor]]:
        """Returns the tensors of each message; complex ones as pairs of real numbers."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        counters: list[Tensor] = []
        for name, tensor in self._select(module).items():
            value = _local_shard(tensor)
            value = torch.view_as_real(value) if value.is_complex() else value
            if value.is_floating_point():
                by_dtype.setdefault(value.dtype, []).append(value.detach())
            elif self._counters and name.endswith("num_batches_tracked"):
                counters.append(value)
        groups = list(by_dtype.values())
        if groups:
            groups[0].extend(counters)
        return groups


def _excluded(module: nn.Module, exclude: Exclude) -> set[str]:
    """Returns the names of tensors that stay as they are."""
    excluded: set[int] = set()
    everything = _by_all_names(module)
    for each in [exclude] if isinstance(exclude, str) else exclude:
        if isinstance(each, str):
            found = {id(tensor) for name, tensor in everything.items() if matches(name, each)}
        else:
            layers = [layer for layer in module.modules() if isinstance(layer, each)]
            found = {id(tensor) for layer in layers for tensor in model_tensors(layer)}
        if not found:
            raise ValueError(f"exclude: {each} matches no tensor of the model")
        excluded |= found
    return {name for name, tensor in named_tensors(module).items() if id(tensor) in excluded}


def matches(name: str, pattern: str) -> bool:
    """Returns whether the name of a tensor or layer, or that of a layer around it, matches."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _averaged_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns those of ``tensors`` that an average changes."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.is_floating_point() or tensor.is_complex()
    }


def _local_shard(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a DTensor; the tensor itself if it is not one."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _check_shards(tensors: Mapping[str, Tensor], group: process_group.Group) -> None:
    """Raises ``ValueError`` for shards of one client's tensor on several ranks of the group."""
    averaged, rank = set(process_group.ranks(group)), process_group.rank()
    for name, tensor in tensors.items():
        is_sharded = any(place.is_shard() for place in getattr(tensor, "placements", ()))
        others = set(_ranks_of(tensor)) - {rank} if is_sharded else set()
        if others & averaged:
            raise ValueError(
                f"{name} is sharded over ranks {sorted(others | {rank})}, which belong to one "
                "client: average over a group of ranks that have the same shard of other clients"
            )


def _ranks_of(tensor: Any) -> list[int]:
    """Returns the ranks of a DTensor's mesh."""
    ranks: list[int] = tensor.device_mesh.mesh.flatten().tolist()
    return ranks


def _check_header(header: Tensor, group: process_group.Group) -> None:
    ranks = process_group.world_size(group)
    *tags, total, bad = header.tolist()
    different_calls.check_tag(tags, _TAG, _CALL, group)
    tolerance = 1e-6 + ranks * torch.finfo(header.dtype).eps
    if bad:
        raise ValueError(f"{bad:.0f} weights on {ranks} ranks are negative or not finite")
    if not abs(total - 1) <= tolerance:  # true for nan too
        raise ValueError(f"the weights sum to {total:.7g} over {ranks} ranks, not to 1")
