"""Weighted sums of models over the clients of a rank and over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..runtime.transfer import copy_all, send
from . import collectives, process_group

_HEADER = 2


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once, in the module's order."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def model_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once, in the module's order."""
    return list(named_tensors(module).values())


Select = Callable[[nn.Module], Mapping[str, Tensor]]
"""The tensors of a module, or some of them, by name; the same ones for every copy of it."""


def average_model(module: nn.Module, weight: float, group: process_group.Group = None) -> None:
    """Set parameters and floating-point buffers to sum_k p_k value_k over the group's ranks.

    One packed all-reduce per dtype; integer counters are left.  A rank with weight 0 contributes
    nothing, whatever its values.  Half-precision values are summed in float32.

    Raises ``ValueError`` on every rank if a weight is negative or not finite, or the weights do
    not sum to 1; the model is then unchanged.
    """
    average_models([module], [weight], group)


def average_models(
    modules: Sequence[nn.Module], weights: Sequence[float], group: process_group.Group = None
) -> None:
    """``average_model`` for several clients of a rank: each module becomes the global model.

    The weights of all clients of all ranks sum to 1; a rank without a client gives one module, with
    the weight 0.
    """
    if not len(modules) == len(weights) >= 1:
        raise ValueError("modules and weights must be equally many, and at least one")
    total = ModelSum(modules[0])
    for module, weight in zip(modules, weights, strict=True):
        total.add(module, weight)
    total.over_ranks(group)
    for module in modules:
        total.copy_to(module)


class ModelSum:
    """sum_k p_k of a model's floating-point tensors, in one flat message per dtype.

    ``select`` names the tensors that count; without it, all do.  A message begins with the sum of
    the weights and the count of bad ones.  With ``counters`` BN's counters of batches travel along
    in the first message (exact to 2^24): they are the same on all clients that train, and so reach
    a rank that has no client.
    """

    def __init__(
        self, module: nn.Module, counters: bool = False, select: Select = named_tensors
    ) -> None:
        self._counters = counters
        self._select = select
        self._weight, self._bad = 0.0, 0
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
        """Add p times the values of ``module``; nothing for weight 0 or a bad weight."""
        weight = float(weight)
        valid = math.isfinite(weight) and weight >= 0
        self._weight += weight if valid else 0.0
        self._bad += not valid
        if not valid or weight == 0 or weight > 2:  # more than 1 fails the check anyway
            return
        for message, tensors in zip(self._messages, self._groups(module), strict=True):
            values = torch.cat([tensor.reshape(-1).to(message.dtype) for tensor in tensors])
            message[_HEADER:].add_(values, alpha=weight)

    def over_ranks(self, group: process_group.Group = None) -> None:
        """Add up the sums of all ranks; one collective per dtype.

        Raises ``ValueError`` on every rank for weights that are not shares of 1.
        """
        for message in self._messages:
            numbers = self._weight, self._bad
            header = torch.tensor(numbers, dtype=message.dtype, device="cpu")
            message[:_HEADER] = send(header, message.device)
            collectives.sum_for_training(message, group, of_models=True)
        for message in self._messages:
            _check_weights(collectives.to_cpu(message[:_HEADER]), process_group.world_size(group))

    def copy_to(self, module: nn.Module) -> None:
        """Give ``module`` the summed values."""
        for message, tensors in zip(self._messages, self._groups(module), strict=True):
            parts = torch.split(message[_HEADER:], [tensor.numel() for tensor in tensors])
            values = [
                (part if tensor.is_floating_point() else part.round()).view(tensor.shape)
                for tensor, part in zip(tensors, parts, strict=True)
            ]
            copy_all(tensors, values)

    def _groups(self, module: nn.Module) -> list[list[Tensor]]:
        groups: dict[torch.dtype, list[Tensor]] = {}
        counters: list[Tensor] = []
        for name, tensor in self._select(module).items():
            value = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            if value.is_floating_point():
                groups.setdefault(value.dtype, []).append(value.detach())
            elif self._counters and name.endswith("num_batches_tracked"):
                counters.append(value)
        found = list(groups.values())
        if found:
            found[0] = found[0] + counters
        return found


def _check_weights(header: Tensor, ranks: int) -> None:
    total, bad = header.tolist()
    tolerance = 1e-6 + ranks * torch.finfo(header.dtype).eps
    if bad:
        raise ValueError(f"{bad:.0f} weights on {ranks} ranks are negative or not finite")
    if not abs(total - 1) <= tolerance:  # true for nan too
        raise ValueError(f"the weights sum to {total:.7g} over {ranks} ranks, not to 1")
