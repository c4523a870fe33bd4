"""Mistakes in the options of data set and partition that depend on each other.

Used by ``validate``.
"""

import math
from collections.abc import Iterator

from .dataset_info import MINIMUM_SAMPLES
from .enums import DataName, NormalisationName, PartitionName, ShiftName
from .errors import format_option_error
from .schema import Config, DataConfig, PartitionConfig

_LARGEST_SAMPLE = 10**8
"""Values of one sample, over channels and pixels."""
_WITHOUT_FILES = (DataName.digits, DataName.synthetic)


def data_mistakes(config: Config) -> Iterator[str]:
    """Yields one line for each mistake."""
    sizes = [*_synthetic(config.data), *_subsets(config.data)]
    yield from sizes
    yield from _images(config.data)
    if config.partition.name is PartitionName.feature_shift:
        yield from _strength(config.partition)
    if config.partition.name is PartitionName.shards:
        yield from _shards(config)
    samples = config.data.info().train
    most = samples // MINIMUM_SAMPLES
    if not sizes and config.clients > most >= 1:
        allowed = f"{most} at most, for {MINIMUM_SAMPLES} of {samples} training samples each"
        remedy = "use fewer clients or more data"
        yield format_option_error("clients", config.clients, allowed, remedy)


def _synthetic(data: DataConfig) -> Iterator[str]:
    if data.name is not DataName.synthetic:
        return
    train, test, shape, classes = data.full_info()
    if len(shape) != 3 or any(size < 1 for size in shape):
        allowed = "three sizes >= 1, [channels, height, width]"
        remedy = "for example data.shape=[3,32,32]"
        yield format_option_error("data.shape", list(shape), allowed, remedy)
    elif math.prod(shape) > _LARGEST_SAMPLE:
        allowed = f"{_LARGEST_SAMPLE} values in all at most"
        yield format_option_error("data.shape", list(shape), allowed, "use smaller samples")
    least = 10 * classes
    if classes < 2:
        remedy = "set data.classes=10"
        yield format_option_error("data.classes", classes, "a whole number >= 2", remedy)
    elif train + test < least:
        allowed = f"10 for each of the {classes} classes, {least}, or more"
        yield format_option_error(
            "data.samples", train + test, allowed, f"set data.samples={least}"
        )


def _subsets(data: DataConfig) -> Iterator[str]:
    """Checks that a subset has a sample of every class and is no larger than the whole."""
    full = data.full_info()
    for option, most in (("train_samples", full.train), ("test_samples", full.test)):
        value = getattr(data, option)
        if value is not None and not full.classes <= value <= most:
            allowed = f"one or more for each of the {full.classes} classes, {most} at most"
            remedy = f"set data.{option}={most} or leave it out"
            yield format_option_error(f"data.{option}", value, allowed, remedy)


def _images(data: DataConfig) -> Iterator[str]:
    shape = data.info().shape
    if data.root is not None and data.name in _WITHOUT_FILES:
        allowed = f"null with data={data.name}, which has no files"
        yield format_option_error("data.root", data.root, allowed, "leave it out")
    elif data.root is not None and not data.root.strip():
        remedy = "name a folder or leave it out"
        yield format_option_error("data.root", data.root, "the name of a folder, or null", remedy)
    synthetic = data.name is DataName.synthetic
    if data.normalisation is NormalisationName.imagenet and (synthetic or shape[0] != 3):
        reason = "which has no pixels" if synthetic else "whose images do not have 3 channels"
        allowed = f"training with data={data.name}, {reason}"
        yield format_option_error("data.normalisation", "imagenet", allowed, "leave it out")
    side = min(shape[1:], default=1)
    if not 0 <= data.crop_padding < max(1, side):
        allowed = f"pixels >= 0, and fewer than an image has on a side, {side}"
        yield format_option_error("data.crop_padding", data.crop_padding, allowed, "leave it out")


def _strength(partition: PartitionConfig) -> Iterator[str]:
    strength = partition.strength
    if partition.shift is ShiftName.intensity:
        valid = strength is None or 1 <= strength <= 1000
        allowed = "a factor >= 1, 1000 at most, with partition.shift=intensity"
        remedy = "try partition.strength=2"
    else:
        valid = strength is None or 0 < strength <= 180
        allowed = "an angle > 0 in degrees, 180 at most, with partition.shift=rotation"
        remedy = "try partition.strength=45"
    if not valid:
        yield format_option_error("partition.strength", strength, allowed, remedy)


def _shards(config: Config) -> Iterator[str]:
    """Checks that each client can have its classes, and that the clients can use all classes."""
    per_client, classes = config.partition.classes_per_client, config.data.info().classes
    if per_client is None:
        return
    option, fewest = "partition.classes_per_client", -(-classes // max(config.clients, 1))
    if not 1 <= per_client <= classes:
        allowed = f"1 to the number of classes, {classes}"
        yield format_option_error(option, per_client, allowed, f"set {option}=2")
    elif per_client < fewest and config.clients >= 1:
        allowed = f"{fewest} or more, for {config.clients} clients to hold all {classes} classes"
        remedy = f"set {option}={fewest} or use more clients"
        yield format_option_error(option, per_client, allowed, remedy)
