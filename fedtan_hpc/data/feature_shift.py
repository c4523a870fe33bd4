"""Feature shift: every client sees its inputs in a fixed way of its own.

Shapes: N samples of C channels and H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from ..runtime import random_streams
from ..config.enums import PartitionName, ShiftName
from ..config.schema import PartitionConfig
from .partition import Indices

_STRENGTH = {ShiftName.rotation: 45.0, ShiftName.intensity: 2.0}
"""Where the options leave it open: degrees, and a factor."""


@dataclass(frozen=True)
class Shift:
    """What clients 0 to ``clients`` - 1 do to normalised inputs; no chance is in it.

    rotation: by angles that are even steps from -strength to +strength degrees, positive turning
    counter-clockwise (Ghosh et al. 2020 have clients with rotated images); intensity: times
    factors in even ratios from 1 / strength to strength.  A single client is left as it is.
    """

    kind: ShiftName
    strength: float
    clients: int

    def amount(self, client: int) -> float:
        """The client's angle in degrees, or its factor."""
        place = 2 * client / (self.clients - 1) - 1 if self.clients > 1 else 0.0
        if self.kind is ShiftName.rotation:
            return float(self.strength * place)
        return float(self.strength**place)

    def apply(self, inputs_NCHW: Tensor, client: int) -> Tensor:
        """All samples as ``client`` sees them, on their device and in their type."""
        if self.kind is ShiftName.rotation:
            return rotated(inputs_NCHW, self.amount(client))
        return inputs_NCHW * self.amount(client)

    def apply_mixed(self, inputs_NCHW: Tensor, clients_N: Indices) -> Tensor:
        """Each sample as the client sees it that it is dealt to; the same bits as by ``apply``."""
        shifted = torch.empty_like(inputs_NCHW)
        for client in np.unique(clients_N):
            chosen = torch.from_numpy(np.flatnonzero(clients_N == client)).to(shifted.device)
            shifted[chosen] = self.apply(inputs_NCHW[chosen], int(client))
        return shifted


def shift_of(config: PartitionConfig, clients: int) -> Shift | None:
    """The shift that the options ask for; None with any partition but feature_shift."""
    if config.name is not PartitionName.feature_shift:
        return None
    kind = config.shift or ShiftName.rotation
    strength = _STRENGTH[kind] if config.strength is None else config.strength
    return Shift(kind, strength, clients)


def clients_of_test(samples: int, clients: int, seed: int) -> Indices:
    """The client that each test sample is dealt to, (N,); their numbers differ by one at most."""
    rng = random_streams.generator(random_streams.TEST_CLIENTS, seed)
    return rng.permutation(np.arange(samples, dtype=np.int64) % clients)


def rotated(inputs_NCHW: Tensor, degrees: float) -> Tensor:
    """Turn images counter-clockwise about their middle: bilinear, the border's values outside.

    Samples count as channels of one large image, which shares a single grid of H x W points.
    """
    if degrees == 0:
        return inputs_NCHW
    height, width = inputs_NCHW.shape[2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Where an output point comes from, in coordinates that run from -1 to 1 both ways, y downwards.
    theta = [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
    image = inputs_NCHW.reshape(1, -1, height, width)
    theta_123 = torch.tensor([theta], dtype=image.dtype, device=image.device)
    grid_1HW2 = affine_grid(theta_123, [1, 1, height, width], align_corners=False)
    turned = grid_sample(image, grid_1HW2, padding_mode="border", align_corners=False)
    return turned.reshape(inputs_NCHW.shape)
