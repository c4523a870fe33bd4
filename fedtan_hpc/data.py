"""Data sets, as labels for all samples and inputs for those that a rank asks for.

Shapes: N samples of C channels and H x W pixels; B a batch; E local steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import streams
from .config import DataConfig, DataName
from .limits import TEST_SHARE
from .partition import Indices


@dataclass(frozen=True)
class Samples:
    """Inputs (N, C, H, W) in float32 and labels (N,) in int64, on one device."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Samples:
        """The same samples on ``device``, the inputs in ``dtype``."""
        return Samples(self.inputs.to(device, dtype), self.labels.to(device))

    def __getitem__(self, chosen: Tensor | slice) -> Samples:
        return Samples(self.inputs[chosen], self.labels[chosen])


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
    """Read or generate the data set; 80 % training, 20 % test, stratified, drawn by ``seed``."""
    return {DataName.digits: _digits, DataName.synthetic: _synthetic}[config.name](config, seed)


def _digits(config: DataConfig, seed: int) -> Dataset:
    """scikit-learn's copy of the UCI handwritten digits: 1,797 of 8x8 pixels, 0 to 16.

    Standardised by the mean and deviation of all training pixels.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    labels = raw.target.astype(np.int64)
    train, test = _split(labels, seed)
    pixels = raw.images[train]
    images = (raw.images - pixels.mean()) / pixels.std()
    inputs = images.astype(np.float32)[:, np.newaxis]
    return Dataset(labels, train, test, (1, 8, 8), 10, lambda indices: inputs[indices])


def _synthetic(config: DataConfig, seed: int) -> Dataset:
    """Gaussian classes: a class has its own mean per channel and pixel; the spread is 1.

    A sample depends on the seed and its index alone, so a rank makes only the ones it holds.
    """
    samples, shape, classes = config.facts()
    labels = np.arange(samples, dtype=np.int64) % classes
    rng = streams.generator(streams.CLASS_MEANS, seed)
    means = 0.5 * rng.standard_normal((classes, shape[0], 1, 1))
    means = means + 0.1 * rng.standard_normal((classes, *shape))

    def read_inputs(indices: Indices) -> npt.NDArray[np.float32]:
        inputs = np.empty((len(indices), *shape), dtype=np.float32)
        for row, index in enumerate(indices):
            noise = streams.generator(streams.SAMPLE, seed, int(index)).standard_normal(shape)
            inputs[row] = means[labels[index]] + noise
        return inputs

    return Dataset(labels, *_split(labels, seed), shape, classes, read_inputs)


def _split(labels_N: Indices, seed: int) -> tuple[Indices, Indices]:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(labels_N)), test_size=TEST_SHARE, stratify=labels_N, random_state=seed
    )
    return np.sort(train), np.sort(test)


def batch_indices(
    samples: int, batch_size: int, steps: int, seed: int, client: int, round_number: int
) -> Tensor:
    """Indices of a client's batches in a round, (E, B) with B = min(batch_size, samples).

    A client goes through its samples in a new order until too few are left for a batch.  The
    order is drawn from (seed, client, round) and so depends on neither ranks nor machine.
    """
    size = min(batch_size, samples)
    per_pass = samples // size
    rng = streams.generator(streams.BATCHES, seed, client, round_number)
    passes = [rng.permutation(samples)[: per_pass * size] for _ in range(-(-steps // per_pass))]
    return torch.from_numpy(np.concatenate(passes).reshape(-1, size)[:steps])
