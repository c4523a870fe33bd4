"""Mistakes in the options of data set and partition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from .dataset_info import MINIMUM_SAMPLES
from .enums import DataName, NormalisationName, PartitionName, ShiftName
from .errors import format_option_error
from .schema import Config, DataConfig, PartitionConfig

_LARGEST_SAMPLE = 10**8
_WITHOUT_FILES = (DataName.digits, DataName.synthetic)


def data_mistakes(config: Config) -> Iterator[str]:
    """One line for each."""
    sizes = [*_synthetic(config.data), *_subsets(config.data)]
    yield from sizes
    yield from _pixels(config.data)
    yield from _partition(config)
    if not sizes:
        yield from _enough_samples(config)


def _synthetic(data: DataConfig) -> Iterator[str]:
    """Sizes that a data set of one's own making has, and no other."""
    given = {"samples": data.samples, "shape": data.shape, "classes": data.classes}
    if data.name is not DataName.synthetic:
        for option, value in given.items():
            if value is not None:
                allowed = f"null with data={data.name}, which has its own"
                yield format_option_error(
                    f"data.{option}", value, allowed, "leave it out or use data=synthetic"
                )
        return
    samples = 10_000 if data.samples is None else data.samples
    _, _, shape, classes = data.facts()
    if len(shape) != 3 or any(size < 1 for size in shape):
        remedy = "for example data.shape=[3,32,32]"
        allowed = "three sizes >= 1, [channels, height, width]"
        yield format_option_error("data.shape", list(shape), allowed, remedy)
    elif math.prod(shape) > _LARGEST_SAMPLE:
        allowed = f"{_LARGEST_SAMPLE} values in all at most"
        yield format_option_error("data.shape", list(shape), allowed, "use smaller samples")
    if classes < 2:
        yield format_option_error(
            "data.classes", classes, "a whole number >= 2", "set data.classes=10"
        )
    elif samples < 10 * classes:
        allowed = f"10 for each of the {classes} classes, {10 * classes}, or more"
        yield format_option_error(
            "data.samples", samples, allowed, f"set data.samples={10 * classes}"
        )


def _subsets(data: DataConfig) -> Iterator[str]:
    """Every class is to have a sample; none can have more than there are."""
    whole = replace(data, train_samples=None, test_samples=None).facts()
    given = {
        "train_samples": (data.train_samples, whole.train),
        "test_samples": (data.test_samples, whole.test),
    }
    for option, (value, most) in given.items():
        if value is not None and not whole.classes <= value <= most:
            allowed = f"one or more for each of the {whole.classes} classes, {most} at most"
            remedy = f"set data.{option}={most} or leave it out"
            yield format_option_error(f"data.{option}", value, allowed, remedy)


def _pixels(data: DataConfig) -> Iterator[str]:
    """Files, normalisation and augmentation."""
    shape = data.facts().shape
    if data.root is not None and data.name in _WITHOUT_FILES:
        allowed = f"null with data={data.name}, which has no files"
        yield format_option_error("data.root", data.root, allowed, "leave it out")
    elif data.root is not None and not data.root.strip():
        remedy = "name a folder or leave it out"
        yield format_option_error("data.root", data.root, "the name of a folder, or null", remedy)
    if data.normalisation is NormalisationName.imagenet:
        if data.name is DataName.synthetic:
            allowed = "training with data=synthetic, which has no pixels"
            yield format_option_error("data.normalisation", "imagenet", allowed, "leave it out")
        elif shape[0] != 3:
            allowed = f"training with data={data.name}, whose images are not of 3 channels"
            yield format_option_error("data.normalisation", "imagenet", allowed, "leave it out")
    side = min(shape[1:], default=1)
    if not 0 <= data.crop_padding < max(1, side):
        allowed = f"pixels >= 0, and fewer than an image has on a side, {side}"
        yield format_option_error("data.crop_padding", data.crop_padding, allowed, "leave it out")


def _partition(config: Config) -> Iterator[str]:
    part = config.partition
    shards, feature = (PartitionName.shards,), (PartitionName.feature_shift,)
    uneven = (PartitionName.dirichlet, PartitionName.quantity)
    owners = {
        "classes_per_client": (part.classes_per_client, shards),
        "alpha": (part.alpha, uneven),
        "shift": (part.shift, feature),
        "strength": (part.strength, feature),
    }
    for option, (value, names) in owners.items():
        if value is not None and part.name not in names:
            remedy = f"leave it out or use {' or '.join(f'partition={name}' for name in names)}"
            yield format_option_error(
                f"partition.{option}", value, f"null with partition={part.name}", remedy
            )
    alpha = part.alpha if part.name in uneven else None
    if alpha is not None and not 0 < alpha <= 1e6:
        remedy = "try partition.alpha=0.5"
        yield format_option_error("partition.alpha", alpha, "a number > 0, 1e6 at most", remedy)
    if part.name in feature:
        yield from _strength(part)
    if part.name in shards and part.classes_per_client is not None:
        yield from _shards(config.clients, part.classes_per_client, config.data.facts().classes)


def _strength(part: PartitionConfig) -> Iterator[str]:
    if part.strength is None:
        return
    if part.shift is ShiftName.intensity:
        if not 1 <= part.strength <= 1000:
            allowed = "a factor >= 1, 1000 at most, with partition.shift=intensity"
            yield format_option_error(
                "partition.strength", part.strength, allowed, "try partition.strength=2"
            )
    elif not 0 < part.strength <= 180:
        allowed = "an angle > 0 in degrees, 180 at most, with partition.shift=rotation"
        yield format_option_error(
            "partition.strength", part.strength, allowed, "try partition.strength=45"
        )


def _shards(clients: int, held: int, classes: int) -> Iterator[str]:
    option = "partition.classes_per_client"
    if not 1 <= held <= classes:
        yield format_option_error(
            option, held, f"1 to the number of classes, {classes}", f"set {option}=2"
        )
    elif clients >= 1 and clients * held < classes:
        least = -(-classes // clients)
        allowed = f"{least} or more, for {clients} clients to hold all {classes} classes"
        yield format_option_error(
            option, held, allowed, f"set {option}={least} or use more clients"
        )


def _enough_samples(config: Config) -> Iterator[str]:
    samples = config.data.facts().train
    most = samples // MINIMUM_SAMPLES
    if config.clients > most >= 1:
        allowed = f"{most} at most, for {MINIMUM_SAMPLES} of {samples} training samples each"
        yield format_option_error(
            "clients", config.clients, allowed, "use fewer clients or more data"
        )
