"""Sizes that both the checks (without numpy) and the data need."""

from __future__ import annotations

from typing import NamedTuple

MINIMUM_SAMPLES = 2
"""Training samples of a client; local batch normalization needs two values per channel."""

TEST_SHARE = 0.2
"""Share of the samples that is kept for the test set, where a data set has none of its own."""

KNOWN_DATA = {
    "digits": (1437, 360, (1, 8, 8), 10),
    "fashion_mnist": (60_000, 10_000, (1, 28, 28), 10),
    "mnist": (60_000, 10_000, (1, 28, 28), 10),
    "cifar10": (50_000, 10_000, (3, 32, 32), 10),
    "cifar100": (50_000, 10_000, (3, 32, 32), 100),
}
"""Training samples, test samples, shape (C, H, W) of a sample, classes."""


class DatasetInfo(NamedTuple):
    """What is known of a data set by its options alone."""

    train: int
    """Training samples."""
    test: int
    """Test samples."""
    shape: tuple[int, ...]
    """Of a sample, (channels, height, width)."""
    classes: int
