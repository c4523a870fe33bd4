"""The model average that ends a round."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import comm


@torch.no_grad()
def average_model(module: nn.Module, weight: float, group: comm.Group = None) -> None:
    """Set parameters and floating-point buffers to sum_k p_k value_k over the group's ranks.

    One packed all-reduce per dtype; integer counters are left.  A rank with weight 0 contributes
    nothing, whatever its values.  Half-precision values are summed in float32.

    Raises ``ValueError`` on every rank if a weight is negative or not finite, or the weights do
    not sum to 1; the model is then unchanged.
    """
    for tensors in _by_dtype(module).values():
        _average(tensors, float(weight), group)


def _average(tensors: list[Tensor], weight: float, group: comm.Group) -> None:
    """Message: weight, count of bad weights, then p times the values."""
    valid = math.isfinite(weight) and weight >= 0
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    size = sum(tensor.numel() for tensor in tensors)
    message = torch.zeros(2 + size, dtype=wide, device=tensors[0].device)
    if valid and weight > 0:
        torch.cat([tensor.reshape(-1) for tensor in tensors], out=message[2:]).mul_(weight)
    message[:2] = message.new_tensor([weight if valid else 0.0, 0.0 if valid else 1.0])
    comm.sum_for_training(message, group)
    _check_weights(message[:2], comm.world_size(group))
    parts = torch.split(message[2:], [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))


def _check_weights(header: Tensor, ranks: int) -> None:
    total, bad = header.tolist()
    tolerance = 1e-6 + ranks * torch.finfo(header.dtype).eps
    if bad:
        raise ValueError(f"{bad:.0f} of {ranks} weights are negative or not finite")
    if abs(total - 1) > tolerance:
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
