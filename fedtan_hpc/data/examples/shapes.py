"""Images of discs, squares and triangles with a mask for each, from sites that differ.

python -m fedtan_hpc data=import data.target=fedtan_hpc.data.examples.shapes:shapes
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import TensorDataset

from ..federated_data import FederatedData

Array = npt.NDArray[Any]
CLASSES = ("background", "disc", "square", "triangle")
_TRAIN, _TEST, _SCANNER = range(3)
"""Streams of random numbers of a client."""


def shapes(
    seed: int,
    clients: int = 4,
    samples: int = 200,
    size: int = 32,
    shift: float = 1.0,
    test: int = 50,
) -> FederatedData:
    """Returns colour images of one to three shapes, and masks with the class of each pixel.

    An image depends on ``seed``, its client and its number alone.

    Args:
        seed: The job's option seed.
        clients: Number of sites.
        samples: Training images of a site.
        size: Height and width in pixels.
        shift: How much the sites' scanners differ; 0 for not at all.
        test: Test images of a site.

    Returns:
        Items of a uint8 image (3, size, size) and an int64 mask (size, size) of ``CLASSES``.

    Raises:
        ValueError: An argument is too small.
    """
    if min(clients, samples, test) < 1 or size < 8 or shift < 0:
        least = "clients, samples and test are at least 1, size at least 8, shift at least 0"
        raise ValueError(least)
    sites = []
    for client in range(clients):
        scanner = Scanner.of(seed, client, shift)
        train = _images(scanner, (seed, client, _TRAIN), samples, size)
        sites.append((train, _images(scanner, (seed, client, _TEST), test, size)))
    return FederatedData(None, clients=sites, classes=len(CLASSES))


@dataclass(frozen=True)
class Scanner:
    """The change of images by the device of a site; values are 0 (black) to 1 (white)."""

    brightness: float
    contrast: float
    noise: float
    """Standard deviation of a value."""
    cast_C: Array
    """Added to red, green and blue."""
    inverts: bool
    """Whether black is shown as white, as in some X-rays."""

    @classmethod
    def of(cls, seed: int, client: int, shift: float) -> "Scanner":
        """Draws the scanner of a client; from a shift of 1 on, every fourth one inverts."""
        rng = np.random.default_rng((seed, client, _SCANNER))
        return cls(
            brightness=0.2 * shift * rng.uniform(-1, 1),
            contrast=2 ** (shift * rng.uniform(-1, 0.3)),
            noise=0.03 * 3 ** (shift * rng.uniform()),
            cast_C=0.15 * shift * rng.uniform(-1, 1, size=3),
            inverts=shift >= 1 and client % 4 == 3,
        )

    def scan(self, scene_CHW: Array, rng: np.random.Generator) -> Array:
        """Returns bytes of what the scanner makes of a scene with values 0 to 1."""
        seen = 1 - scene_CHW if self.inverts else scene_CHW
        seen = 0.5 + self.brightness + self.contrast * (seen - 0.5) + self.cast_C[:, None, None]
        seen = seen + self.noise * rng.standard_normal(seen.shape)
        return np.asarray((255 * seen).round().clip(0, 255), dtype=np.uint8)


def _images(scanner: Scanner, stream: tuple[int, int, int], count: int, size: int) -> TensorDataset:
    images, masks = [], []
    for number in range(count):
        rng = np.random.default_rng((*stream, number))
        scene_CHW, mask_HW = _scene(size, rng)
        images.append(scanner.scan(scene_CHW, rng))
        masks.append(mask_HW)
    return TensorDataset(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)))


def _scene(size: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draws values 0 to 1 of a scene (3, size, size) and its mask; later shapes cover others."""
    scene_CHW = np.full((3, size, size), 0.3)
    mask_HW = np.zeros((size, size), dtype=np.int64)
    for _ in range(rng.integers(1, 4)):
        kind, radius = int(rng.integers(1, len(CLASSES))), size * rng.uniform(0.12, 0.25)
        row, column = rng.uniform(0.2 * size, 0.8 * size, size=2)
        inside_HW = _inside(kind, np.ogrid[-row : size - row, -column : size - column], radius)
        mask_HW[inside_HW] = kind
        scene_CHW[:, inside_HW] = rng.uniform(0.5, 0.9, size=(3, 1))
    return (scene_CHW + 0.05 * rng.standard_normal(scene_CHW.shape)).clip(0, 1), mask_HW


def _inside(kind: int, offsets: Any, radius: float) -> Array:
    """Returns which pixels, at these rows and columns from the centre, a shape covers."""
    y, x = offsets
    if CLASSES[kind] == "disc":
        inside = y**2 + x**2 <= radius**2
    elif CLASSES[kind] == "square":
        inside = np.maximum(abs(y), abs(x)) <= 0.85 * radius
    else:
        inside = (abs(y) <= radius) & (2 * abs(x) <= y + radius)
    return np.asarray(inside)
