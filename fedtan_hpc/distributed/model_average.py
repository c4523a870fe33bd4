"""Weighted sums of models over the clients of a rank and over the ranks.

``average_model`` and ``average_models`` are for a user's training loop; a job's cohort uses
``ModelSum``.  The names of a model's tensors are here too, for all rooms above.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..runtime.transfer import copy_all, send
from . import collectives, process_group

_HEADER = 2
"""Values at the front of each message: the sum of the weights, and the number of bad ones."""


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by name, each once, in the module's order."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def model_tensors(module: nn.Module) -> list[Tensor]:
    """Returns parameters and buffers, each once, in the module's order."""
    return list(named_tensors(module).values())


Select = Callable[[nn.Module], Mapping[str, Tensor]]
"""Returns tensors of a module by name; the same names for every copy of the module."""


def average_model(module: nn.Module, weight: float, group: process_group.Group = None) -> None:
    """Sets parameters and floating-point buffers to sum_k p_k value_k over the ranks of ``group``.

    Each rank is one client k, and ``weight`` is its p_k; the weights of all ranks sum to 1.  A rank
    of weight 0 contributes nothing, whatever its values.  Each dtype takes one all-reduce; half
    precision is summed in float32.  Integer buffers stay as they are.

    Raises ``ValueError`` on every rank if a weight is negative or not finite, or the weights do
    not sum to 1; the model is then unchanged.
    """
    average_models([module], [weight], group)


def average_models(
    modules: Sequence[nn.Module], weights: Sequence[float], group: process_group.Group = None
) -> None:
    """Sets every module of ``modules`` to the weighted mean over all clients of all ranks.

    ``modules`` are the models of the clients on this rank, ``weights`` their p_k, which sum to 1
    over all ranks.  A rank without a client passes one module with weight 0.  Tensors, messages and
    errors are those of ``average_model``.
    """
    if not len(modules) == len(weights) >= 1:
        raise ValueError("modules and weights must be equally many, and at least one")
    total = ModelSum(modules[0])
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

        Raises ``ValueError`` on every rank if a weight is negative or not finite, or the weights
        of all ranks do not sum to 1.
        """
        for message in self._messages:
            numbers = self._weight, self._bad_weights
            header = torch.tensor(numbers, dtype=message.dtype, device="cpu")
            message[:_HEADER] = send(header, message.device)
            collectives.sum_for_training(message, group, of_models=True)
        for message in self._messages:
            _check_weights(collectives.to_cpu(message[:_HEADER]), process_group.world_size(group))

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
            value = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            if value.is_floating_point():
                by_dtype.setdefault(value.dtype, []).append(value.detach())
            elif self._counters and name.endswith("num_batches_tracked"):
                counters.append(value)
        groups = list(by_dtype.values())
        if groups:
            groups[0].extend(counters)
        return groups


def _check_weights(header: Tensor, ranks: int) -> None:
    total, bad = header.tolist()
    tolerance = 1e-6 + ranks * torch.finfo(header.dtype).eps
    if bad:
        raise ValueError(f"{bad:.0f} weights on {ranks} ranks are negative or not finite")
    if not abs(total - 1) <= tolerance:  # true for nan too
        raise ValueError(f"the weights sum to {total:.7g} over {ranks} ranks, not to 1")
