"""The check that all ranks hold the same model, bit by bit, by one small collective."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import comm
from .average import model_tensors

_BITS_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""At most 32 bits at a time, so that none is among those that the sum loses."""
_KEEP_62_BITS = (1 << 62) - 1  # so that the negative exists too


@torch.no_grad()
def ranks_that_differ(module: nn.Module) -> list[int]:
    """Ranks whose model is not rank 0's, the same list on every rank; empty if all agree."""
    checksum = _checksum(model_tensors(module))
    largest, smallest_negated = comm.max_over_ranks(torch.stack([checksum, -checksum]))
    if largest == -smallest_negated:
        return []
    gathered = comm.all_gather(checksum)
    return [number for number, other in enumerate(gathered) if other != gathered[0]]


def _checksum(tensors: list[Tensor]) -> Tensor:
    """A 62-bit sum of all bits, weighted by place; 0-d int64."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        value = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = value.reshape(-1).view(_BITS_OF_SIZE[value.element_size()])
        place = torch.arange(1, 2 * bits.numel() + 1, 2, device=bits.device)
        total = total * 1_000_003 + (bits * place).sum()
    return total & _KEEP_62_BITS
