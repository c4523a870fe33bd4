"""Makes a ``Dataset`` of the user's own data.  Used by ``datasets``.

The ranks share the reading that is needed beforehand, of targets and of pixels: each reads a part.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...config.dataset_info import MINIMUM_SAMPLES
from ...config.enums import NormalisationName, TaskName
from ...config.errors import ConfigError, format_option_error
from ...config.schema import DataConfig, TaskConfig
from ...distributed import collectives
from .. import image_files
from ..augmentation import ImageSteps, image_steps_of
from ..batching import Dataset, Draw, Moments
from ..federated_data import OwnData, load_own
from ..partition import Indices, split_test, subsets
from .items import ItemKind, ItemReader
from .shared import error_of, on_all_ranks, shared
from .targets import TargetRule, class_number

_MOMENT_SAMPLES = 1000
"""Most training images of which mean and deviation are computed, evenly spread."""


def load(config: DataConfig, seed: int, task: TaskConfig) -> Dataset:
    """Opens the data, reads targets where the data do not list them, and the first sample.

    Reads class numbers only; other targets come with each sample.  All ranks call it together, and
    ``begin_reading`` of the result before they read.  Raises ``ConfigError`` on all of them for
    what is wrong.
    """
    own, steps = _shared_open(config, seed)
    reader = ItemReader(own.pieces, steps, seed)
    classes: int | None
    if has_classes := _has_class_numbers(config, task, reader):
        labels_N = _labels(config, own, reader)
        classes = _classes(config, own, labels_N, reader)
    else:
        labels_N = np.zeros(own.size, dtype=np.int64)
        is_number = task.name is TaskName.regression
        classes = None if is_number else _class_count(config, own)
        rule = TargetRule(task.name, classes, task.ignore_index)
        if task.name is TaskName.segmentation:
            _check_count(config, classes)
        reader = ItemReader(own.pieces, steps, seed, rule)
    train, test, clients, client_tests = _divided(config, own, labels_N, seed)

    def found(_: Indices) -> list[tuple[ItemKind, int | None]]:
        return [(reader.find_kind(int(train[0])), reader.outputs)]

    [(kind, outputs)] = shared(config, found, train[:1], "", on_all=True)
    pixels = _Pixels(config, reader, train)

    def read(indices: Indices, draw: Draw | None) -> Any:
        inputs = reader.batch(indices, draw)
        return pixels.normalised(inputs) if kind.is_image else inputs

    def read_pairs(indices: Indices, draw: Draw | None) -> tuple[Any, torch.Tensor]:
        inputs, targets = reader.pairs(indices, draw)
        return pixels.normalised(inputs) if kind.is_image else inputs, targets

    return Dataset(
        labels_N,
        train,
        test,
        kind.shape,
        outputs if classes is None else classes,
        read,
        read_pairs=None if has_classes else read_pairs,
        names=None if classes is None else _names(own),
        moments=pixels.moments,
        begin_reading=pixels.measure if kind.is_image else None,
        kept=reader if steps.are_random else None,
        clients=clients,
        client_tests=client_tests,
        sample_bytes=reader.raw_bytes if steps.are_random else kind.nbytes + reader.target_bytes,
    )


def _has_class_numbers(config: DataConfig, task: TaskConfig, reader: ItemReader) -> bool:
    """Whether targets are class numbers; for a task of the user's if the first target is one."""
    if task.name is not TaskName.import_:
        return task.name is TaskName.classification
    first = np.array([0])
    targets = shared(config, lambda part: reader.targets(part), first, "", on_all=True)
    return class_number(targets[0]) is not None


def _shared_open(config: DataConfig, seed: int) -> tuple[OwnData, ImageSteps]:
    """Opens the data on each rank; an error of any rank is raised on all."""
    own, steps, mistakes = OwnData(), ImageSteps(None, None, None), tuple[str, ...]()
    try:
        own, steps = load_own(config, seed), image_steps_of(config)
    except ConfigError as error:
        mistakes = error.mistakes
    gathered = collectives.all_gather_object((mistakes, [len(p.items) for p in own.pieces]))
    for found, _ in gathered:
        if found:
            raise on_all_ranks(ConfigError(*found))
    sizes = [each for _, each in gathered]
    if differing := [rank for rank, each in enumerate(sizes) if each != sizes[0]]:
        rank = differing[0]
        found = f"rank {rank} has {sizes[rank]} samples in its data sets, and rank 0 {sizes[0]}"
        raise error_of(config, "the same data on every rank", found)
    return own, steps


def _labels(config: DataConfig, own: OwnData, reader: ItemReader) -> Indices:
    listed = reader.class_numbers()
    if listed is not None and listed.min() >= 0:
        return listed
    numbers = shared(
        config,
        lambda part: [class_number(target) for target in reader.targets(part)],
        np.arange(own.size),
        "reading targets",
    )
    if None in numbers:
        index = numbers.index(None)
        [target] = reader.targets(np.array([index]))
        allowed = "data whose targets are class numbers, whole numbers from 0"
        raise error_of(config, allowed, f"the target of {reader.name(index)} is {target!r:.80}")
    return np.array(numbers, dtype=np.int64)


def _classes(config: DataConfig, own: OwnData, labels_N: Indices, reader: ItemReader) -> int:
    """Returns the number of classes; raises ``ConfigError`` for a target that is not below it."""
    classes = _class_count(config, own) or int(labels_N.max()) + 1
    if wrong := np.flatnonzero(labels_N >= classes).tolist():
        allowed = f"data with class numbers below the number of classes, {classes}"
        found = f"the target of {reader.name(wrong[0])} is {labels_N[wrong[0]]}"
        raise error_of(config, allowed, found)
    if classes < 2:
        raise error_of(config, "data of two classes or more", "every target is 0")
    return classes


def _class_count(config: DataConfig, own: OwnData) -> int | None:
    """Returns the number of classes that the data tell; None if they do not.

    Raises ``ConfigError`` if their data sets name different classes.
    """
    lists = _name_lists(own)
    if different := [each for each in lists if each != lists[0]]:
        found = f"some have {lists[0]!s:.80} and some {different[0]!s:.80}"
        raise error_of(config, "data sets with the same attribute classes", found)
    return own.classes or (len(lists[0]) if lists else None)


def _check_count(config: DataConfig, classes: int | None) -> None:
    """Raises ``ConfigError`` unless masks have a known number of classes, two or more."""
    if classes is None:
        remedy = "give FederatedData the argument classes, or the data set a list classes"
        raise error_of(config, "data that tell the number of classes of their masks", remedy)
    if classes < 2:
        remedy = f"they tell of {classes}; the background of a mask is a class too"
        raise error_of(config, "data of two classes or more", remedy)


def _name_lists(own: OwnData) -> list[list[Any]]:
    """Returns the lists of class names that data sets have."""
    named = [getattr(piece.items, "classes", None) for piece in own.pieces]
    return [list(each) for each in named if isinstance(each, list | tuple)]


def _names(own: OwnData) -> list[str] | None:
    lists = _name_lists(own)
    return [str(name) for name in lists[0]] if lists else None


def _divided(
    config: DataConfig, own: OwnData, labels_N: Indices, seed: int
) -> tuple[Indices, Indices, list[Indices] | None, dict[int, Indices]]:
    """Returns the training and test samples, all together and those of each natural client."""
    train = np.concatenate(own.train)
    clients, client_tests = own.clients, dict(own.client_tests)
    if own.test:
        test = np.unique(np.concatenate(own.test))
    elif clients is not None:  # each client gives a fifth
        clients = [np.sort(each) for each in clients]
        parts = [_split_client(labels_N, each, seed + k) for k, each in enumerate(clients)]
        clients = [part for part, _ in parts]
        client_tests = {k: part for k, (_, part) in enumerate(parts) if len(part)}
        everyone = np.concatenate(own.clients or [])
        others = np.setdiff1d(train, everyone)
        train, test = np.concatenate([*clients, others]), np.concatenate([t for _, t in parts])
    else:
        if len(train) < 5:
            raise error_of(config, "data with five samples or more, or with a test set", "too few")
        first, second = split_test(labels_N[train], seed)
        train, test = train[first], train[second]
    if not len(test):
        raise error_of(config, "data with test samples", "there are none")
    train, test = subsets(config, labels_N, np.sort(train), np.sort(test), seed)
    if clients is not None:
        clients = [np.intersect1d(each, train) for each in clients]
        client_tests = {k: np.intersect1d(each, test) for k, each in client_tests.items()}
        client_tests = {k: each for k, each in client_tests.items() if len(each)}
    return train, test, clients, client_tests


def _split_client(labels_N: Indices, samples: Indices, seed: int) -> tuple[Indices, Indices]:
    """Splits a client's samples; one with fewer than five keeps all for training."""
    if len(samples) < 5:
        return samples, samples[:0]
    train, test = split_test(labels_N[samples], seed)
    return samples[train], samples[test]


def check_clients(clients: Sequence[Indices]) -> None:
    """Raises ``ConfigError`` for a natural client with too few training samples."""
    for number, each in enumerate(clients):
        if len(each) < MINIMUM_SAMPLES:
            allowed = f"another partition, because client {number} has {len(each)} training samples"
            remedy = f"give each client {MINIMUM_SAMPLES} or more"
            message = format_option_error("partition.name", "natural", allowed, remedy)
            raise on_all_ranks(ConfigError(message))


class _Pixels:
    """The normalisation of images."""

    def __init__(self, config: DataConfig, reader: ItemReader, train: Indices) -> None:
        self._config, self._reader, self._train = config, reader, train
        self._moments: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None

    def measure(self) -> None:
        """Computes mean and deviation of the training images, of which each rank reads a part.

        Raises ``ConfigError`` on all ranks.
        """
        config, train = self._config, self._train
        assert self._reader.kind is not None
        channels = self._reader.kind.shape[0]
        counts_CV = np.zeros((channels, 256), dtype=np.int64)
        if config.normalisation is NormalisationName.imagenet and channels != 3:
            allowed = f"training or none with images of {channels} channels"
            name = "data.normalisation"
            message = format_option_error(name, "imagenet", allowed, "leave it out")
            raise on_all_ranks(ConfigError(message))
        if config.normalisation is NormalisationName.training:
            spread = np.linspace(0, len(train) - 1, min(len(train), _MOMENT_SAMPLES)).astype(int)
            read = partial(_counts, self._reader)
            counts = shared(config, read, train[spread], "reading pixels")
            counts_CV = np.sum(counts, axis=0)
        self._moments = image_files.moments(counts_CV, config.normalisation)

    def moments(self) -> Moments | None:
        """Returns mean and deviation; None for inputs that are no images."""
        return None if self._moments is None else Moments.of(*self._moments)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns pixels of bytes minus the mean, over the deviation."""
        assert self._moments is not None, "begin_reading comes first"
        return torch.from_numpy(image_files.normalised(pixels.numpy(), *self._moments))


def _counts(reader: ItemReader, part: Indices) -> list[npt.NDArray[np.int64]]:
    pixels = reader.batch(part, None).numpy()
    return [image_files.value_counts(pixels)] if len(pixels) else []
