"""Random flips and crops of training images, applied on the device.  Used by ``training``.

Shapes: E local steps with batches of B images of C channels and H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..config.schema import DataConfig
from ..runtime import random_streams
from ..runtime.transfer import send


@dataclass(frozen=True)
class Augmentation:
    """Mirrors each image with probability 1/2, then crops it at random."""

    flip: bool
    crop_padding: int
    """Zero pixels that are added on each side before an image is cropped to its old size."""

    def draw(
        self, seed: int, client: int, round_number: int, steps: int, batch_size: int
    ) -> AugmentationParams:
        """Draws all random parameters of a client's round on the CPU.

        They depend on the arguments alone, neither on ranks nor on the device.
        """
        flips_EB, offsets_EB2, shape = None, None, (steps, batch_size)
        if self.flip:
            rng = random_streams.generator(random_streams.FLIPS, seed, client, round_number)
            flips_EB = torch.from_numpy(rng.random(shape) < 0.5)
        if self.crop_padding:
            rng = random_streams.generator(random_streams.CROPS, seed, client, round_number)
            offsets_EB2 = torch.from_numpy(
                rng.integers(2 * self.crop_padding + 1, size=(*shape, 2))
            )
        return AugmentationParams(self.crop_padding, flips_EB, offsets_EB2)


@dataclass(frozen=True)
class AugmentationParams:
    """Random parameters of one client's images in a round; None: no such operation."""

    padding: int
    flips_EB: Tensor | None
    """Whether an image is mirrored, bool."""
    offsets_EB2: Tensor | None
    """Upper left corner (y, x) of the crop in the padded image, 0 to 2 * padding."""

    def to(self, device: torch.device) -> AugmentationParams:
        """Copies the parameters to ``device``."""
        flips = None if self.flips_EB is None else send(self.flips_EB, device)
        offsets = None if self.offsets_EB2 is None else send(self.offsets_EB2, device)
        return AugmentationParams(self.padding, flips, offsets)

    def apply(self, step: int, inputs_BCHW: Tensor) -> Tensor:
        """Returns the batch of local step ``step``, 0 to E - 1, flipped and cropped."""
        if self.flips_EB is not None:
            flips_B111 = self.flips_EB[step, :, None, None, None]
            inputs_BCHW = torch.where(flips_B111, inputs_BCHW.flip(-1), inputs_BCHW)
        if self.offsets_EB2 is not None:
            inputs_BCHW = crop_images(inputs_BCHW, self.offsets_EB2[step], self.padding)
        return inputs_BCHW


def augmentation_of(config: DataConfig) -> Augmentation | None:
    """Returns the augmentation that the options describe; None if they ask for none."""
    if not config.flip and not config.crop_padding:
        return None
    return Augmentation(config.flip, config.crop_padding)


def crop_images(inputs_BCHW: Tensor, offsets_B2: Tensor, padding: int) -> Tensor:
    """Pads each image with ``padding`` zero pixels and cuts out H x W pixels from its offset."""
    batch_size, _, height, width = inputs_BCHW.shape
    padded = pad(inputs_BCHW, (padding, padding, padding, padding))
    windows_BCyxHW = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view of all crops
    samples_B = torch.arange(batch_size, device=inputs_BCHW.device)
    return windows_BCyxHW[samples_B, :, offsets_B2[:, 0], offsets_B2[:, 1]]
