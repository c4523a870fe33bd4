"""Loads data sets: the built-in ones, and by ``own.datasets`` the user's.

``load`` is used by ``job`` and ``reporting``.  Shapes: N samples of C channels and H x W pixels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..config.dataset_info import KNOWN_DATASETS
from ..config.enums import DataName, PartitionName
from ..config.schema import Config, DataConfig, TaskConfig
from ..runtime import random_streams
from . import image_files
from .augmentation import image_steps_of
from .batching import Dataset, Draw, KeptItems, Moments
from .federated_data import Piece
from .own import datasets as own_datasets
from .own.items import ItemReader
from .partition import Indices, split, split_test, subsets

ReadInputs = Callable[[Indices], npt.NDArray[Any]]


def load(config: DataConfig, seed: int, task: TaskConfig | None = None) -> Dataset:
    """Reads, opens or generates the data set; ``download.fetch`` provides its files beforehand.

    A data set without a test set is split by ``seed``: 80 % training, 20 % test, stratified.  All
    ranks call it together.  ``task`` says what targets are; by default class numbers.  Raises
    ``ConfigError`` if files are missing or damaged.
    """
    if config.is_own:
        return own_datasets.load(config, seed, task or TaskConfig())
    if config.name is DataName.digits:
        return _digits(config, seed)
    if config.name is DataName.synthetic:
        return _synthetic(config, seed)
    return _images(config, seed)


def partition_of(dataset: Dataset, config: Config) -> list[Indices]:
    """Returns each client's training samples, as indices into the data set."""
    if config.partition.name is PartitionName.natural:
        assert dataset.clients is not None
        return list(dataset.clients)
    labels = dataset.labels_N[dataset.train]
    parts = split(labels, config.clients, config.partition, config.seed)
    return [dataset.train[part] for part in parts]


def _images(config: DataConfig, seed: int) -> Dataset:
    pixels_NCHW, labels_N = image_files.read(config)
    info = KNOWN_DATASETS[config.name]
    train, test = np.split(np.arange(len(labels_N)), [info.train])
    train, test = subsets(config, labels_N, train, test, seed)
    if len(train) + len(test) < len(labels_N):
        used = np.concatenate([train, test])
        pixels_NCHW, labels_N = pixels_NCHW[used], labels_N[used]
    counts_CV = image_files.value_counts(pixels_NCHW[: len(train)])
    moments = image_files.moments(counts_CV, config.normalisation)
    found = partial(Moments.of, *moments)
    read, kept = _reader(config, seed, lambda indices: pixels_NCHW[indices], labels_N)

    def read_normalised(indices: Indices, draw: Draw | None) -> torch.Tensor:
        return torch.from_numpy(image_files.normalised(read(indices, draw), *moments))

    train, test = np.split(np.arange(len(labels_N)), [len(train)])
    return Dataset(
        labels_N, train, test, info.shape, info.classes, read_normalised, kept=kept, moments=found
    )


class _Items:
    """Built-in data as items, for transforms of single inputs."""

    def __init__(self, read: ReadInputs, targets: Indices) -> None:
        self._read, self.targets = read, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self._read(np.array([index]))[0]), int(self.targets[index])


def _reader(
    config: DataConfig, seed: int, read: ReadInputs, labels_N: Indices
) -> tuple[Callable[[Indices, Draw | None], npt.NDArray[Any]], KeptItems | None]:
    """Returns ``read`` with the random steps of single inputs, where ``config`` asks for such.

    Then the second value is what holds inputs in memory.
    """
    steps = image_steps_of(config)
    if not steps.are_random:
        return lambda indices, draw: read(indices), None
    items = ItemReader([Piece(str(config.name), _Items(read, labels_N))], steps, seed)
    items.find_kind(0)

    def read_drawn(indices: Indices, draw: Draw | None) -> npt.NDArray[Any]:
        if draw is None:
            return read(indices)
        inputs: npt.NDArray[Any] = items.batch(indices, draw).numpy()
        return inputs

    return read_drawn, items


def _digits(config: DataConfig, seed: int) -> Dataset:
    """Loads scikit-learn's copy of the UCI handwritten digits: 1,797 of 8x8 pixels, 0 to 16.

    One mean and one deviation of all training pixels standardise the pixels.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    labels_N = raw.target.astype(np.int64)
    train, test = subsets(config, labels_N, *split_test(labels_N, seed), seed)
    pixels = raw.images[train]
    mean, deviation = pixels.mean(), pixels.std()
    images = (raw.images - mean) / deviation
    inputs = images.astype(np.float32)[:, np.newaxis]
    read, kept = _reader(config, seed, lambda indices: inputs[indices], labels_N)
    found = partial(Moments.of, mean, deviation)
    return Dataset(labels_N, train, test, (1, 8, 8), 10, _as_tensor(read), kept=kept, moments=found)


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

    train, test = subsets(config, labels_N, *split_test(labels_N, seed), seed)
    read, kept = _reader(config, seed, read_inputs, labels_N)
    return Dataset(labels_N, train, test, shape, classes, _as_tensor(read), kept=kept)


def _as_tensor(
    read: Callable[[Indices, Draw | None], npt.NDArray[Any]],
) -> Callable[[Indices, Draw | None], torch.Tensor]:
    return lambda indices, draw: torch.from_numpy(read(indices, draw))
