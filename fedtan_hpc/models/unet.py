"""A small U-Net with BN, which gives scores for each pixel.  Used by ``factory``."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from .small_networks import convolution


class UNet(nn.Module):
    """Follows the idea of Ronneberger et al. 2015: a way down, a way up, and skips between them.

    Each level has two 3x3 convolutions with BN.  The way down halves the image between levels and
    rounds up; the way up enlarges by nearest neighbours to the size of the skip.  So images of any
    size fit, and no border is lost.

    Args:
        in_channels: Channels of an image.
        classes: Scores of each pixel.
        widths: Channels of each level, from the full size to the smallest.
    """

    def __init__(
        self, in_channels: int, classes: int, widths: tuple[int, ...] = (16, 32, 64, 128)
    ) -> None:
        super().__init__()
        self.down = nn.ModuleList(_level(*pair) for pair in pairwise((in_channels, *widths)))
        upwards = pairwise(reversed(widths))
        self.up = nn.ModuleList(_level(below + width, width) for below, width in upwards)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns scores (N, classes, H, W) for images ``x`` (N, in_channels, H, W)."""
        skips: list[Tensor] = []
        for level in self.down:
            x = level(max_pool2d(x, 2, ceil_mode=True) if skips else x)
            skips.append(x)
        skips.pop()
        for level in self.up:
            skip = skips.pop()
            x = level(torch.cat([interpolate(x, size=skip.shape[-2:]), skip], dim=1))
        return self.head(x)  # type: ignore[no-any-return]


def _level(width: int, out_width: int) -> nn.Module:
    return nn.Sequential(*convolution(width, out_width), *convolution(out_width, out_width))
