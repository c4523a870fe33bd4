"""The check that all ranks hold the same model, bit by bit, by one small collective."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import collectives
from .model_average import model_tensors

_WORD_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""At most 32 bits at a time, so that none is among those that the sum loses."""
_ODD = (1_000_003, 0x51_7C_C1_B7_27_22_0A_95, 0x2545_F491_4F6C_DD1D)
_KEEP_62_BITS = (1 << 62) - 1  # so that the negative exists too


@torch.no_grad()
def ranks_that_differ(module: nn.Module) -> list[int]:
    """Ranks whose model is not rank 0's, the same list on every rank; empty if all agree."""
    tensors = model_tensors(module)
    if not tensors:
        return []
    checksum = _checksum(tensors)
    largest, smallest_negated = collectives.to_cpu(
        collectives.max_over_ranks(torch.stack([checksum, -checksum]))
    )
    if largest == -smallest_negated:
        return []
    gathered = collectives.to_cpu(torch.stack(collectives.all_gather(checksum)))
    return [number for number, other in enumerate(gathered) if other != gathered[0]]


def _checksum(tensors: list[Tensor]) -> Tensor:
    """A 62-bit sum over all words of 32 bits or less, each scrambled with its place; 0-d int64."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        value = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        words = value.reshape(-1).view(_WORD_OF_SIZE[value.element_size()])
        place = torch.arange(1, words.numel() + 1, device=words.device)
        total = total * _ODD[0] + _scramble(words + place * _ODD[1]).sum()
    return total & _KEEP_62_BITS


def _scramble(value: Tensor) -> Tensor:
    """Multiply and fold: no simple pair of changes cancels in a sum of the results."""
    value = value * _ODD[2]
    value = (value ^ (value >> 29)) * _ODD[1]
    return value ^ (value >> 32)
