"""Feature shift: every client's inputs go through a fixed transformation.

Used by ``client_store``; ``job`` creates the shift.  Shapes: N samples, C channels, H x W pixels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from ..config.enums import PartitionName, ShiftName
from ..config.schema import PartitionConfig
from ..runtime import random_streams
from .partition import Indices

_STRENGTH = {ShiftName.rotation: 45.0, ShiftName.intensity: 2.0}
"""Default strengths: an angle in degrees, and a factor."""


@dataclass(frozen=True)
class Shift:
    """Deterministic transformations of normalised inputs for clients 0 to ``clients`` - 1.

    rotation: angles in even steps from -strength to +strength degrees, positive counter-clockwise
    (Ghosh et al. 2020 use rotated images); intensity: factors in even ratios from 1 / strength to
    strength.  The inputs of a single client stay unchanged.
    """

    kind: ShiftName
    strength: float
    clients: int

    def amount(self, client: int) -> float:
        """Returns the client's angle in degrees, or its factor."""
        position = 2 * client / (self.clients - 1) - 1 if self.clients > 1 else 0.0  # -1 to 1
        if self.kind is ShiftName.rotation:
            return float(self.strength * position)
        return float(self.strength**position)

    def apply(self, inputs_NCHW: Tensor, client: int) -> Tensor:
        """Returns the inputs after the transformation of ``client``; device and type stay."""
        if self.kind is ShiftName.rotation:
            return rotate(inputs_NCHW, self.amount(client))
        return inputs_NCHW * self.amount(client)

    def apply_mixed(self, inputs_NCHW: Tensor, clients_N: Indices) -> Tensor:
        """Returns each input after the transformation of its client; bits are as from ``apply``."""
        shifted = torch.empty_like(inputs_NCHW)
        for client in np.unique(clients_N):
            indices = torch.from_numpy(np.flatnonzero(clients_N == client)).to(shifted.device)
            shifted[indices] = self.apply(inputs_NCHW[indices], int(client))
        return shifted


def shift_of(config: PartitionConfig, clients: int) -> Shift | None:
    """Returns the shift that the options describe; None unless the partition is feature_shift."""
    if config.name is not PartitionName.feature_shift:
        return None
    kind = config.shift or ShiftName.rotation
    strength = _STRENGTH[kind] if config.strength is None else config.strength
    return Shift(kind, strength, clients)


def clients_of_test(samples: int, clients: int, seed: int) -> Indices:
    """Assigns test samples at random to clients, (N,), in numbers that differ by at most one."""
    rng = random_streams.generator(random_streams.TEST_CLIENTS, seed)
    return rng.permutation(np.arange(samples, dtype=np.int64) % clients)


def rotate(inputs_NCHW: Tensor, degrees: float) -> Tensor:
    """Rotates images counter-clockwise about their centre: bilinear, with border values outside.

    All samples form the channels of one image, so that they share one grid of H x W points.
    """
    if degrees == 0:
        return inputs_NCHW
    height, width = inputs_NCHW.shape[2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Source of each output point, in coordinates from -1 to 1 on both axes, y downwards.
    theta = [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
    image = inputs_NCHW.reshape(1, -1, height, width)
    theta_123 = torch.tensor([theta], dtype=image.dtype, device=image.device)
    grid_1HW2 = affine_grid(theta_123, [1, 1, height, width], align_corners=False)
    rotated = grid_sample(image, grid_1HW2, padding_mode="border", align_corners=False)
    return rotated.reshape(inputs_NCHW.shape)
