"""The options of data set and partition.  Users import them from ``schema``."""

import math
from dataclasses import dataclass, field
from typing import Any

from . import enums
from .dataset_info import KNOWN_DATASETS, TEST_SHARE, DatasetInfo
from .errors import ConfigError, format_option_error


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Chooses the data set, the part in use, and augmentation."""

    name: enums.DataName = enums.DataName.digits
    """Data set. digits and synthetic need no files; folder (images) and import are your own."""
    root: str | None = None
    """Folder with the data set's files; null: data/, or Debian's copy of fashion_mnist."""
    target: str | None = None
    """Function that returns the data, package.module:callable. Only for data=import."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the function, for example {site: 3}. Only for data=import."""
    train_samples: int | None = None
    """Training samples in use, a random subset stratified by class; null: all."""
    test_samples: int | None = None
    """Test samples in use, a random subset stratified by class; null: all."""
    loading: enums.LoadingName = enums.LoadingName.auto
    """Samples: device (in memory), stream (read batch by batch), auto: device if they fit."""
    workers: int | None = None
    """Processes of a rank that read batches of a stream; 0: none; null: by its CPUs, 1 to 8."""
    normalisation: enums.NormalisationName = enums.NormalisationName.training
    """Mean and deviation per channel of pixels: the training images', ImageNet's, or none."""
    image_size: int | None = None
    """Side in pixels of the square images that are cut out of your own. Only for folder, import."""
    resize: int | None = None
    """Shorter side in pixels to which images are scaled before the cut; null: image_size."""
    flip: bool = False
    """Augmentation: mirrors each training image left to right with probability 1/2."""
    crop_padding: int = 0
    """Augmentation: pads each training image with this many zero pixels, then crops at random."""
    random_resized_crop: bool = False
    """Augmentation: cuts 8 to 100 % of a training image's area at random and scales the piece."""
    colour_jitter: float = 0.0
    """Augmentation: largest relative change of brightness, contrast and saturation, 0 to 1."""
    transform: str | None = None
    """Augmentation: your function of one training input, package.module:callable."""
    samples: int | None = None
    """Number of samples, 80 % training and 20 % test. Only for synthetic; default 10000."""
    shape: list[int] | None = None
    """Shape of a sample, [channels, height, width]. Only for synthetic; default [3, 32, 32]."""
    classes: int | None = None
    """Number of classes. Only for synthetic; default 10."""

    @property
    def is_own(self) -> bool:
        """Whether the data are the user's: their sizes are known only once they are open."""
        return self.name in (enums.DataName.folder, enums.DataName.import_)

    def full_info(self) -> DatasetInfo:
        """Returns the sizes of the whole data set, without reading files.

        Raises ``ConfigError`` for the user's own data, of which they are not known.
        """
        if self.is_own:
            allowed = "a built-in data set, because the sizes of samples must be known here"
            remedy = "use data=synthetic with data.shape, data.classes and data.samples"
            raise ConfigError(format_option_error("data.name", self.name, allowed, remedy))
        if self.name is not enums.DataName.synthetic:
            return KNOWN_DATASETS[self.name]
        samples = 10_000 if self.samples is None else self.samples
        shape = (3, 32, 32) if self.shape is None else tuple(self.shape)
        classes = 10 if self.classes is None else self.classes
        test = math.ceil(samples * TEST_SHARE)
        return DatasetInfo(samples - test, test, shape, classes)

    def info(self) -> DatasetInfo:
        """Returns the sizes of the part of the data set that is in use, without reading files."""
        full = self.full_info()
        train = full.train if self.train_samples is None else self.train_samples
        test = full.test if self.test_samples is None else self.test_samples
        return full._replace(train=train, test=test)


@dataclass(kw_only=True, slots=True)
class PartitionConfig:
    """Divides the training samples among the clients."""

    name: enums.PartitionName = enums.PartitionName.shards
    """iid, by label (shards, dirichlet), by size (quantity), feature_shift, or your natural one."""
    classes_per_client: int | None = None
    """Classes per client. Only for shards; default 2, or more if few clients share all classes."""
    alpha: float | None = None
    """Dirichlet concentration; small is uneven. Only for dirichlet and quantity; default 0.5."""
    shift: enums.ShiftName | None = None
    """Transformation of each client's inputs. Only for feature_shift; default rotation."""
    strength: float | None = None
    """Largest angle in degrees (default 45) or intensity factor (2). Only for feature_shift."""

    def shard_classes(self, clients: int, classes: int) -> int:
        """Returns ``classes_per_client``; by default the least number >= 2 to use all classes."""
        return self.classes_per_client or min(classes, max(2, -(-classes // clients)))
