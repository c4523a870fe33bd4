"""The model average that ends a round."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import comm

_HEADER = 2


@torch.no_grad()
def average_model(module: nn.Module, weight: float, group: comm.Group = None) -> None:
    """Set parameters and floating-point buffers to sum_k p_k value_k over the group's ranks.

    One packed all-reduce per dtype; integer counters are left.  A rank with weight 0 contributes
    nothing, whatever its values.  Half-precision values are summed in float32.

    Raises ``ValueError`` on every rank if a weight is negative or not finite, or the weights do
    not sum to 1; the model is then unchanged.
    """
    groups = list(_by_dtype(module).values())
    sums = [_weighted_sum(tensors, float(weight), group) for tensors in groups]
    for message in sums:
        _check_weights(message[:_HEADER], comm.world_size(group))
    for tensors, message in zip(groups, sums, strict=True):
        parts = torch.split(message[_HEADER:], [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def _weighted_sum(tensors: list[Tensor], weight: float, group: comm.Group) -> Tensor:
    """One collective; a header of the weight and the count of bad weights, then p times values."""
    valid = math.isfinite(weight) and weight >= 0
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    size = sum(tensor.numel() for tensor in tensors)
    message = torch.zeros(_HEADER + size, dtype=wide, device=tensors[0].device)
    if valid and weight > 0:
        values = [tensor.reshape(-1) for tensor in tensors]
        torch.cat(values, out=message[_HEADER:]).mul_(weight)
    message[:_HEADER] = message.new_tensor([weight if valid else 0.0, 0.0 if valid else 1.0])
    return comm.sum_for_training(message, group)


def _check_weights(header: Tensor, ranks: int) -> None:
    total, bad = header.tolist()
    tolerance = 1e-6 + ranks * torch.finfo(header.dtype).eps
    if bad:
        raise ValueError(f"{bad:.0f} of {ranks} weights are negative or not finite")
    if not abs(total - 1) <= tolerance:  # true for nan too
        raise ValueError(f"the weights sum to {total:.7g} over {ranks} ranks, not to 1")


def model_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once, in the module's order."""
    return list(_unique([*module.parameters(), *module.buffers()]))


def _by_dtype(module: nn.Module) -> dict[torch.dtype, list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in model_tensors(module):
        value = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if value.is_floating_point():
            groups.setdefault(value.dtype, []).append(value)
    return groups


def _unique(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    return {id(tensor): tensor for tensor in tensors}.values()
