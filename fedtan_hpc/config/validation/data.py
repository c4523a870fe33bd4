"""Mistakes in the options of data set and partition that depend on each other.

Used by ``validate``.
"""

import math
from collections.abc import Iterator

from ..dataset_info import MINIMUM_SAMPLES, DatasetInfo
from ..enums import (
    DataName,
    LoadingName,
    ModelName,
    ModelSource,
    NormalisationName,
    PartitionName,
    ShiftName,
)
from ..errors import format_option_error
from ..schema import Config, DataConfig, PartitionConfig
from .training import is_import_path, own_code_mistakes

_LARGEST_SAMPLE = 10**8
"""Values of one sample, over channels and pixels."""
_WITHOUT_FILES = (DataName.digits, DataName.synthetic)


def data_mistakes(config: Config) -> Iterator[str]:
    """Yields one line for each mistake; sizes of the user's data are checked when they are open."""
    yield from _own(config.data)
    yield from _loading(config.data)
    yield from _image_steps(config.data)
    if config.partition.name is PartitionName.feature_shift:
        yield from _strength(config.partition)
    if config.partition.name is PartitionName.natural and not config.data.is_own:
        allowed = f"one of the others with data={config.data.name}, which has no clients of its own"
        remedy = "use data=folder or data=import, or another partition"
        yield format_option_error("partition.name", "natural", allowed, remedy)
    if not config.data.is_own:
        yield from _built_in(config)


def _built_in(config: Config) -> Iterator[str]:
    sizes = [*_synthetic(config.data), *_subsets(config.data)]
    yield from sizes
    yield from _images(config.data)
    if not sizes:
        yield from partition_mistakes(config, config.data.info())


def partition_mistakes(config: Config, info: DatasetInfo) -> Iterator[str]:
    """Yields a line for each option that a data set of so many samples and classes forbids."""
    if config.partition.name is PartitionName.shards:
        yield from _shards(config, info.classes)
    samples = info.train
    most = samples // MINIMUM_SAMPLES
    if config.clients > max(most, 1) and config.partition.name is not PartitionName.natural:
        allowed = f"{most} at most, for {MINIMUM_SAMPLES} of {samples} training samples each"
        remedy = "use fewer clients or more data"
        yield format_option_error("clients", config.clients, allowed, remedy)


def own_data_mistakes(config: Config, info: DatasetInfo, natural: int | None) -> Iterator[str]:
    """Yields a line for each option that the user's open data forbid.

    ``natural`` is the number of clients that the data name, if they do.
    """
    data, shape = config.data, info.shape
    is_image = isinstance(shape, tuple) and [type(size) for size in shape] == [int] * 3
    yield from _natural(config, natural)
    yield from _sizes_in_use(data, info)
    if not is_image:
        what = f"the inputs have the shape {shape}, not (channels, height, width)"
        for option in ("flip", "crop_padding", "random_resized_crop", "colour_jitter"):
            if value := getattr(data, option):
                remedy = f"leave it out, because {what}"
                yield format_option_error(f"data.{option}", value, "null or false", remedy)
        if config.partition.name is PartitionName.feature_shift:
            allowed = f"another partition, because {what}"
            yield format_option_error("partition.name", "feature_shift", allowed, "use iid")
        if not (config.model.source is ModelSource.import_ or _takes(config, shape)):
            allowed = f"mlp or your own, because {what}"
            remedy = "use model=import model.target=package.module:callable"
            yield format_option_error("model.name", config.model.name, allowed, remedy)
    elif data.crop_padding >= min(shape[1:]):
        allowed = f"fewer pixels than an image has on a side, {min(shape[1:])}"
        yield format_option_error("data.crop_padding", data.crop_padding, allowed, "leave it out")


def _takes(config: Config, shape: object) -> bool:
    """Whether the network is the mlp, and the inputs are single tensors, which it flattens."""
    is_mlp = config.model.source is ModelSource.builtin and config.model.name == ModelName.mlp
    return is_mlp and isinstance(shape, tuple) and all(isinstance(size, int) for size in shape)


def _natural(config: Config, natural: int | None) -> Iterator[str]:
    if config.partition.name is not PartitionName.natural:
        return
    if natural is None:
        allowed = "one of the others, because the data name no clients"
        remedy = "return a FederatedData with clients, or use a folder for each client"
        yield format_option_error("partition.name", "natural", allowed, remedy)
    elif config.clients not in (natural, Config().clients):
        allowed = f"the number of clients in the data, {natural}"
        yield format_option_error("clients", config.clients, allowed, "leave it out")
    elif (config.clients_per_round or 1) > natural:
        allowed = f"1 to the number of clients in the data, {natural}"
        remedy = f"set clients_per_round={natural} or leave it out"
        yield format_option_error("clients_per_round", config.clients_per_round, allowed, remedy)


def _sizes_in_use(data: DataConfig, info: DatasetInfo) -> Iterator[str]:
    """Checks that a subset could be drawn."""
    for option, size in (("train_samples", info.train), ("test_samples", info.test)):
        value = getattr(data, option)
        if value is not None and value != size:
            allowed = f"1 to the number that the data have, {size}"
            yield format_option_error(f"data.{option}", value, allowed, "leave it out")


def _own(data: DataConfig) -> Iterator[str]:
    """Target, options and folder of the user's own data."""
    is_import, example = data.name is DataName.import_, "my_data:hospitals"
    yield from own_code_mistakes("data", is_import, data.target, data.options, example)
    if data.name is DataName.folder and not (data.root or "").strip():
        allowed, remedy = "the folder of the images", "for example data.root=~/scans"
        yield format_option_error("data.root", data.root or "null", allowed, remedy)
    for option in ("image_size", "resize"):
        value = getattr(data, option)
        if value is not None and not data.is_own:
            allowed = "null unless data=folder or data=import"
            yield format_option_error(f"data.{option}", value, allowed, "leave it out")
    if data.resize is not None and data.resize < (data.image_size or 0):
        allowed = f"data.image_size, {data.image_size}, or more"
        yield format_option_error("data.resize", data.resize, allowed, "leave it out")
    if data.resize is not None and data.image_size is None:
        allowed = "null without data.image_size"
        yield format_option_error("data.resize", data.resize, allowed, "set data.image_size too")


def _loading(data: DataConfig) -> Iterator[str]:
    if data.workers is not None and data.loading is LoadingName.device:
        allowed = "null with data.loading=device, which reads all samples at the start"
        remedy = "leave it out or use data.loading=stream"
        yield format_option_error("data.workers", data.workers, allowed, remedy)


def _image_steps(data: DataConfig) -> Iterator[str]:
    """Augmentation of single images."""
    if data.transform is not None and not is_import_path(data.transform):
        remedy = "for example data.transform=my_data:blur"
        yield format_option_error(
            "data.transform", data.transform, "package.module:callable", remedy
        )
    if data.name in _WITHOUT_FILES:
        for option in ("random_resized_crop", "colour_jitter"):
            if getattr(data, option):
                value = str(getattr(data, option)).lower()
                allowed = f"{'0' if option == 'colour_jitter' else 'false'} with data={data.name}"
                remedy = "leave it out, because its samples are no images of 8 bits"
                yield format_option_error(f"data.{option}", value, allowed, remedy)
    if data.random_resized_crop and data.is_own and data.image_size is None:
        allowed, remedy = "false without data.image_size", "set data.image_size, for example to 224"
        yield format_option_error("data.random_resized_crop", "true", allowed, remedy)


def _synthetic(data: DataConfig) -> Iterator[str]:
    if data.name is not DataName.synthetic:
        return
    train, test, shape, classes = data.full_info()
    if len(shape) != 3:
        allowed = "three sizes >= 1, [channels, height, width]"
        remedy = "for example data.shape=[3,32,32]"
        yield format_option_error("data.shape", list(shape), allowed, remedy)
    elif math.prod(shape) > _LARGEST_SAMPLE:
        allowed = f"{_LARGEST_SAMPLE} values in all at most"
        yield format_option_error("data.shape", list(shape), allowed, "use smaller samples")
    least = 10 * classes
    if train + test < least:
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
    if data.normalisation is NormalisationName.none and data.name in _WITHOUT_FILES:
        allowed = f"training with data={data.name}"
        yield format_option_error("data.normalisation", "none", allowed, "leave it out")
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


def _shards(config: Config, classes: int) -> Iterator[str]:
    """Checks that each client can have its classes, and that the clients can use all classes."""
    per_client = config.partition.classes_per_client
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
