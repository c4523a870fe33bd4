"""Random flips and crops of training images, drawn for a client and a round, done on the device.

Shapes: E local steps with batches of B samples of C channels and H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..runtime import random_streams
from ..config.schema import DataConfig
from ..runtime.transfer import send


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images: first a mirror image by chance 1/2, then a random crop."""

    flip: bool
    crop_padding: int
    """Pixels of 0 put on each side before cropping to the old size."""

    def draw(
        self, seed: int, client: int, round_number: int, steps: int, batch_size: int
    ) -> AugmentationParams:
        """All that chance decides in a client's round, on the CPU.

        It depends on these numbers alone, and so on neither ranks nor device.
        """
        flips_EB = offsets_EB2 = None
        if self.flip:
            rng = random_streams.generator(random_streams.FLIPS, seed, client, round_number)
            flips_EB = torch.from_numpy(rng.random((steps, batch_size)) < 0.5)
        if self.crop_padding:
            rng = random_streams.generator(random_streams.CROPS, seed, client, round_number)
            offsets = rng.integers(2 * self.crop_padding + 1, size=(steps, batch_size, 2))
            offsets_EB2 = torch.from_numpy(offsets)
        return AugmentationParams(self.crop_padding, flips_EB, offsets_EB2)


@dataclass(frozen=True)
class AugmentationParams:
    """Flips (E, B), bool, and crops' upper left corners (E, B, 2), (y, x) in 0 to 2 padding.

    None stands for an operation that is not asked for.
    """

    padding: int
    flips_EB: Tensor | None
    offsets_EB2: Tensor | None

    def to(self, device: torch.device) -> AugmentationParams:
        """The same decisions on ``device``."""
        flips = None if self.flips_EB is None else send(self.flips_EB, device)
        offsets = None if self.offsets_EB2 is None else send(self.offsets_EB2, device)
        return AugmentationParams(self.padding, flips, offsets)

    def apply(self, step: int, inputs_BCHW: Tensor) -> Tensor:
        """The batch of step 0 to E - 1, flipped and then cropped."""
        if self.flips_EB is not None:
            inputs_BCHW = flipped(inputs_BCHW, self.flips_EB[step])
        if self.offsets_EB2 is not None:
            inputs_BCHW = cropped(inputs_BCHW, self.offsets_EB2[step], self.padding)
        return inputs_BCHW


def augmentation_of(config: DataConfig) -> Augmentation | None:
    """What the options ask for; None if that is nothing."""
    if not config.flip and not config.crop_padding:
        return None
    return Augmentation(config.flip, config.crop_padding)


def flipped(inputs_BCHW: Tensor, flips_B: Tensor) -> Tensor:
    """Mirror those samples left to right whose flag is set."""
    return torch.where(flips_B[:, None, None, None], inputs_BCHW.flip(-1), inputs_BCHW)


def cropped(inputs_BCHW: Tensor, offsets_B2: Tensor, padding: int) -> Tensor:
    """Pad with ``padding`` pixels of 0, then cut H x W pixels out from each sample's own corner."""
    samples, _, height, width = inputs_BCHW.shape
    padded = pad(inputs_BCHW, (padding, padding, padding, padding))
    windows_BCyxHW = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view of all crops
    places = torch.arange(samples, device=inputs_BCHW.device)
    return windows_BCyxHW[places, :, offsets_B2[:, 0], offsets_B2[:, 1]]
