"""Data sets: labels of all samples, and inputs of the samples that a rank asks for.

``load`` is used by ``job`` and ``reporting``.  Shapes: N samples of C channels and H x W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..config.dataset_info import KNOWN_DATASETS, TEST_SHARE
from ..config.enums import DataName, NormalisationName
from ..config.schema import DataConfig
from ..runtime import random_streams
from . import image_files
from .batching import Samples
from .partition import Indices

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of red, green and blue, 0 to 1, as in torchvision's pretrained models."""


@dataclass(frozen=True)
class Dataset:
    """All labels and the split are in memory; ``read_inputs`` returns inputs for given indices."""

    labels_N: Indices
    train: Indices
    test: Indices
    shape: tuple[int, ...]
    """Shape (C, H, W) of a sample."""
    classes: int
    read_inputs: Callable[[Indices], npt.NDArray[np.float32]]

    def take(self, indices: Indices) -> Samples:
        """Returns the samples at ``indices`` of the whole data set, on the CPU."""
        inputs = torch.from_numpy(self.read_inputs(indices))
        return Samples(inputs, torch.from_numpy(self.labels_N[indices]))


def load(config: DataConfig, seed: int) -> Dataset:
    """Reads or generates the data set; ``download.fetch`` provides its files beforehand.

    A data set without a test set is split by ``seed``: 80 % training, 20 % test, stratified.
    Raises ``ConfigError`` if files are missing or damaged.
    """
    if config.name is DataName.digits:
        return _digits(config, seed)
    if config.name is DataName.synthetic:
        return _synthetic(config, seed)
    return _images(config, seed)


def _images(config: DataConfig, seed: int) -> Dataset:
    pixels_NCHW, labels_N = image_files.read(config)
    info = KNOWN_DATASETS[config.name]
    train, test = np.split(np.arange(len(labels_N)), [info.train])
    train, test = _subsets(config, labels_N, train, test, seed)
    if len(train) + len(test) < len(labels_N):
        used = np.concatenate([train, test])
        pixels_NCHW, labels_N = pixels_NCHW[used], labels_N[used]
    mean_C11, deviation_C11 = _moments(pixels_NCHW[: len(train)], config.normalisation)

    def read_inputs(indices: Indices) -> npt.NDArray[np.float32]:
        inputs = pixels_NCHW[indices].astype(np.float32)
        inputs -= mean_C11
        inputs /= deviation_C11
        return inputs

    train, test = np.split(np.arange(len(labels_N)), [len(train)])
    return Dataset(labels_N, train, test, info.shape, info.classes, read_inputs)


def _moments(
    pixels_NCHW: npt.NDArray[np.uint8], normalisation: NormalisationName
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Returns exact mean and deviation per channel of pixels 0 to 255, each (C, 1, 1)."""
    if normalisation is NormalisationName.imagenet:
        moments = np.array(_IMAGENET) * 255
    else:
        counts = np.array([_histogram(pixels_NCHW[:, c]) for c in range(pixels_NCHW.shape[1])])
        values = np.arange(256)
        mean = counts @ values / counts.sum(1)
        squares = (counts * (values - mean[:, np.newaxis]) ** 2).sum(1)
        moments = np.array([mean, np.sqrt(squares / counts.sum(1))])
    mean_C, deviation_C = moments.astype(np.float32)
    deviation_C[deviation_C == 0] = 1  # a channel with one value becomes 0
    return mean_C[:, np.newaxis, np.newaxis], deviation_C[:, np.newaxis, np.newaxis]


def _histogram(pixels_NHW: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Counts the 256 values in chunks, because np.bincount converts its input to int64."""
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(pixels_NHW), 1024):
        counts += np.bincount(pixels_NHW[start : start + 1024].ravel(), minlength=256)
    return counts


def _digits(config: DataConfig, seed: int) -> Dataset:
    """Loads scikit-learn's copy of the UCI handwritten digits: 1,797 of 8x8 pixels, 0 to 16.

    One mean and one deviation of all training pixels standardise the pixels.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    labels_N = raw.target.astype(np.int64)
    train, test = _subsets(config, labels_N, *_split(labels_N, seed), seed)
    pixels = raw.images[train]
    images = (raw.images - pixels.mean()) / pixels.std()
    inputs = images.astype(np.float32)[:, np.newaxis]
    return Dataset(labels_N, train, test, (1, 8, 8), 10, lambda indices: inputs[indices])


def _synthetic(config: DataConfig, seed: int) -> Dataset:
    """Generates Gaussian classes: each has its mean per channel and pixel; the deviation is 1.

    A sample depends on the seed and its index alone, so a rank generates only its samples.
    """
    train_size, test_size, shape, classes = config.full_info()
    labels_N = np.arange(train_size + test_size, dtype=np.int64) % classes
    rng = random_streams.generator(random_streams.CLASS_MEANS, seed)
    means = 0.5 * rng.standard_normal((classes, shape[0], 1, 1))
    means = means + 0.1 * rng.standard_normal((classes, *shape))

    def read_inputs(indices: Indices) -> npt.NDArray[np.float32]:
        inputs = np.empty((len(indices), *shape), dtype=np.float32)
        for row, index in enumerate(indices):
            noise_rng = random_streams.generator(random_streams.SAMPLE, seed, int(index))
            inputs[row] = means[labels_N[index]] + noise_rng.standard_normal(shape)
        return inputs

    train, test = _subsets(config, labels_N, *_split(labels_N, seed), seed)
    return Dataset(labels_N, train, test, shape, classes, read_inputs)


def _split(labels_N: Indices, seed: int) -> tuple[Indices, Indices]:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(labels_N)), test_size=TEST_SHARE, stratify=labels_N, random_state=seed
    )
    return np.sort(train), np.sort(test)


def _subsets(
    config: DataConfig, labels_N: Indices, train: Indices, test: Indices, seed: int
) -> tuple[Indices, Indices]:
    if config.train_samples is not None:
        rng = random_streams.generator(random_streams.TRAIN_SUBSET, seed)
        train = train[_stratified(labels_N[train], config.train_samples, rng)]
    if config.test_samples is not None:
        rng = random_streams.generator(random_streams.TEST_SUBSET, seed)
        test = test[_stratified(labels_N[test], config.test_samples, rng)]
    return train, test


def _stratified(labels_N: Indices, size: int, rng: np.random.Generator) -> Indices:
    """Draws ``size`` ascending indices; each class keeps its fraction as closely as possible.

    Class sizes are rounded down, and the classes with the largest remainders get one more.  If
    ``size`` allows it, a class without samples then gets one from the largest class.
    """
    classes, counts = np.unique(labels_N, return_counts=True)
    sizes, remainders = np.divmod(size * counts, len(labels_N))
    sizes[np.argsort(-remainders, kind="stable")[: size - sizes.sum()]] += 1
    for empty in np.flatnonzero(sizes == 0) if size >= len(classes) else ():
        sizes[np.argmax(sizes)] -= 1
        sizes[empty] += 1
    members = (np.flatnonzero(labels_N == label) for label in classes)
    drawn = [rng.permutation(m)[:wanted] for m, wanted in zip(members, sizes, strict=True)]
    return np.sort(np.concatenate(drawn))
