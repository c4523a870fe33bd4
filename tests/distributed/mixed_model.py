"""A model with every dtype that training meets, for the average and the consistency check."""

from __future__ import annotations

import torch
from torch import nn


class Mixed(nn.Module):
    """A module with floats of all widths, complex numbers, a shared parameter and counters."""

    def __init__(self) -> None:
        super().__init__()
        self.single = nn.Conv2d(3, 4, 2)
        self.single.weight.data = self.single.weight.data.to(memory_format=torch.channels_last)
        self.double_ = nn.Linear(3, 2, dtype=torch.float64)
        self.half_ = nn.Linear(5, 3, dtype=torch.bfloat16)
        self.wave = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        self.long_wave = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex128))
        self.norm = nn.BatchNorm1d(4)
        self.again = self.double_
        self.same_weight = self.double_.weight
        self.register_buffer("mask", torch.tensor([True, False]))


def mixed(seed: int) -> Mixed:
    """Returns the model with random values that depend on ``seed``."""
    module, generator = Mixed(), torch.Generator().manual_seed(seed)
    for value in module.state_dict().values():
        if value.is_floating_point() or value.is_complex():
            value.copy_(torch.randn(value.shape, dtype=torch.float64, generator=generator))
            if value.is_complex():
                value.imag.copy_(torch.randn(value.shape, generator=generator))
    module.norm.get_buffer("num_batches_tracked").fill_(seed)
    return module
