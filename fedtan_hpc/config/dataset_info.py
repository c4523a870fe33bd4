"""Sizes of data sets, for the checks of the options and for the data room."""

from typing import NamedTuple

from .enums import DataName

MINIMUM_SAMPLES = 2
"""Fewest training samples of a client: local batch normalization needs two values per channel."""

TEST_SHARE = 0.2
"""Fraction of the samples in the test set, for data sets that come without a test set."""


class DatasetInfo(NamedTuple):
    """Sizes of a data set: ``shape`` is (channels, height, width) of one sample."""

    train: int
    """Number of training samples."""
    test: int
    """Number of test samples."""
    shape: tuple[int, ...]
    classes: int


KNOWN_DATASETS = {
    DataName.digits: DatasetInfo(1437, 360, (1, 8, 8), 10),
    DataName.fashion_mnist: DatasetInfo(60_000, 10_000, (1, 28, 28), 10),
    DataName.mnist: DatasetInfo(60_000, 10_000, (1, 28, 28), 10),
    DataName.cifar10: DatasetInfo(50_000, 10_000, (3, 32, 32), 10),
    DataName.cifar100: DatasetInfo(50_000, 10_000, (3, 32, 32), 100),
}
"""Complete data sets; the sizes of synthetic data are options."""
