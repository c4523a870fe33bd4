"""Data sets, as labels for all samples and inputs for those that a rank asks for.

Shapes: N samples of C channels and H x W pixels; B a batch; E local steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import image_files
from ..runtime import random_streams
from ..config.enums import DataName, NormalisationName, SamplingName
from ..config.schema import DataConfig
from ..config.dataset_info import KNOWN_DATA, TEST_SHARE
from .batching import Samples
from .partition import Indices

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of red, green and blue, 0 to 1, as torchvision's pretrained models have it."""




@dataclass(frozen=True)
class Dataset:
    """Labels and split are known in full; inputs come for the indices that are asked for."""

    labels_N: Indices
    train: Indices
    test: Indices
    shape: tuple[int, ...]
    classes: int
    read_inputs: Callable[[Indices], npt.NDArray[np.float32]]

    def take(self, indices: Indices) -> Samples:
        """The samples at ``indices`` of the whole data set, on the CPU."""
        inputs = torch.from_numpy(self.read_inputs(indices))
        return Samples(inputs, torch.from_numpy(self.labels_N[indices]))


def load(config: DataConfig, seed: int) -> Dataset:
    """Read or generate the data set; its files, if it has any, ``fetch`` has seen to.

    A set without a test part of its own is split by ``seed``, 80 % training, 20 % test, stratified.
    Raises ``ConfigError`` if files are missing or damaged.
    """
    if config.name is DataName.digits:
        return _digits(config, seed)
    if config.name is DataName.synthetic:
        return _synthetic(config, seed)
    return _images(config, seed)


def _images(config: DataConfig, seed: int) -> Dataset:
    """Images from files, kept as the bytes of those samples that are used: training, then test."""
    pixels, labels = image_files.read(config)
    everything = np.arange(len(labels))
    first_test = KNOWN_DATA[str(config.name)][0]
    train, test = _used(config, labels, everything[:first_test], everything[first_test:], seed)
    if len(train) + len(test) < len(labels):
        used = np.concatenate([train, test])
        pixels, labels = pixels[used], labels[used]
    places = np.arange(len(labels))
    train, test = places[: len(train)], places[len(train) :]
    mean_C11, deviation_C11 = _moments(pixels[: len(train)], config.normalisation)

    def read_inputs(indices: Indices) -> npt.NDArray[np.float32]:
        inputs = pixels[indices].astype(np.float32)
        inputs -= mean_C11
        inputs /= deviation_C11
        return inputs

    _, _, shape, classes = config.facts()
    return Dataset(labels, train, test, shape, classes, read_inputs)


def _moments(
    pixels_NCHW: npt.NDArray[np.uint8], normalisation: NormalisationName
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean and deviation per channel, each (C, 1, 1), of pixels 0 to 255: counted, so exact."""
    if normalisation is NormalisationName.imagenet:
        moments = np.array(_IMAGENET) * 255
    else:
        counts = np.array([_histogram(pixels_NCHW[:, c]) for c in range(pixels_NCHW.shape[1])])
        values = np.arange(256)
        mean = counts @ values / counts.sum(1)
        squares = (counts * (values - mean[:, np.newaxis]) ** 2).sum(1)
        moments = np.array([mean, np.sqrt(squares / counts.sum(1))])
    mean_C, deviation_C = moments.astype(np.float32)
    deviation_C[deviation_C == 0] = 1  # a channel of one value becomes 0
    return mean_C[:, np.newaxis, np.newaxis], deviation_C[:, np.newaxis, np.newaxis]


def _histogram(pixels_NHW: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """How often each of the 256 values is there, in pieces, since counting widens its input."""
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(pixels_NHW), 1024):
        counts += np.bincount(pixels_NHW[start : start + 1024].ravel(), minlength=256)
    return counts


def _digits(config: DataConfig, seed: int) -> Dataset:
    """scikit-learn's copy of the UCI handwritten digits: 1,797 of 8x8 pixels, 0 to 16.

    Standardised by the mean and deviation of all training pixels.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    labels = raw.target.astype(np.int64)
    train, test = _used(config, labels, *_split(labels, seed), seed)
    pixels = raw.images[train]
    images = (raw.images - pixels.mean()) / pixels.std()
    inputs = images.astype(np.float32)[:, np.newaxis]
    return Dataset(labels, train, test, (1, 8, 8), 10, lambda indices: inputs[indices])


def _synthetic(config: DataConfig, seed: int) -> Dataset:
    """Gaussian classes: a class has its own mean per channel and pixel; the spread is 1.

    A sample depends on the seed and its index alone, so a rank makes only the ones it holds.
    """
    facts = replace(config, train_samples=None, test_samples=None).facts()
    shape, classes = facts.shape, facts.classes
    labels = np.arange(facts.train + facts.test, dtype=np.int64) % classes
    rng = random_streams.generator(random_streams.CLASS_MEANS, seed)
    means = 0.5 * rng.standard_normal((classes, shape[0], 1, 1))
    means = means + 0.1 * rng.standard_normal((classes, *shape))

    def read_inputs(indices: Indices) -> npt.NDArray[np.float32]:
        inputs = np.empty((len(indices), *shape), dtype=np.float32)
        for row, index in enumerate(indices):
            noise = random_streams.generator(random_streams.SAMPLE, seed, int(index)).standard_normal(shape)
            inputs[row] = means[labels[index]] + noise
        return inputs

    train, test = _used(config, labels, *_split(labels, seed), seed)
    return Dataset(labels, train, test, shape, classes, read_inputs)


def _split(labels_N: Indices, seed: int) -> tuple[Indices, Indices]:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(labels_N)), test_size=TEST_SHARE, stratify=labels_N, random_state=seed
    )
    return np.sort(train), np.sort(test)


def _used(
    config: DataConfig, labels_N: Indices, train: Indices, test: Indices, seed: int
) -> tuple[Indices, Indices]:
    """As many of each as the options say, drawn by seed."""
    if config.train_samples is not None:
        rng = random_streams.generator(random_streams.TRAIN_SUBSET, seed)
        train = train[_subset(labels_N[train], config.train_samples, rng)]
    if config.test_samples is not None:
        rng = random_streams.generator(random_streams.TEST_SUBSET, seed)
        test = test[_subset(labels_N[test], config.test_samples, rng)]
    return train, test


def _subset(labels_N: Indices, wanted: int, rng: np.random.Generator) -> Indices:
    """Places of ``wanted`` samples, ascending, with each class's share as near as can be.

    Shares are rounded down and those with the largest remainder get one more; a class that would
    have none gets one from the class that has most, if ``wanted`` goes round.
    """
    classes, counts = np.unique(labels_N, return_counts=True)
    shares, remainders = np.divmod(wanted * counts, len(labels_N))
    shares[np.argsort(-remainders, kind="stable")[: wanted - shares.sum()]] += 1
    for place in np.flatnonzero(shares == 0) if wanted >= len(classes) else ():
        shares[np.argmax(shares)] -= 1
        shares[place] += 1
    members = (np.flatnonzero(labels_N == label) for label in classes)
    drawn = [rng.permutation(m)[:share] for m, share in zip(members, shares, strict=True)]
    return np.sort(np.concatenate(drawn))


