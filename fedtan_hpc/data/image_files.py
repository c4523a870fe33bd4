"""Image data sets in files: sources, folders, reading, and the normalisation of pixels.

Used by ``datasets``, ``own.datasets`` and ``download``.

Shapes: N samples of C channels and H x W pixels.
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..config.dataset_info import KNOWN_DATASETS
from ..config.enums import DataName, NormalisationName
from ..config.errors import ConfigError, format_option_error, one_line
from ..config.path_options import expanded
from ..config.schema import DataConfig
from ..files import reading
from ..files.reading import FileError
from ..runtime.torchvision_import import import_torchvision

Bytes: TypeAlias = npt.NDArray[np.uint8]
Labels: TypeAlias = npt.NDArray[np.int64]
_Splits: TypeAlias = list[tuple[Bytes, npt.NDArray[Any]]]
"""Pixels and labels of the training set and of the test set."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of red, green and blue, 0 to 1, as in torchvision's pretrained models."""
_IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_IDX_HEADER = 16
"""Most bytes before the values of an IDX file."""
_CIFAR_BYTES = 2**28
"""Largest file of CIFAR, unpacked; the largest of today has 155 MB."""
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


class Source(NamedTuple):
    """Origin of a data set's files, and torchvision's layout for them."""

    torchvision_class: str
    folder: str
    """Folder with the unpacked files, relative to torchvision's root."""
    page: str
    """Web page that offers the files."""
    archive: str | None = None
    """File that contains all others and lies in torchvision's root; None for IDX files."""


_ZALANDO = "github.com/zalandoresearch/fashion-mnist or Debian's package dataset-fashion-mnist"
_TORONTO = "www.cs.toronto.edu/~kriz"
_MIRROR = "ossci-datasets.s3.amazonaws.com/mnist"
SOURCES = {
    DataName.mnist: Source("MNIST", "MNIST/raw", _MIRROR),
    DataName.fashion_mnist: Source("FashionMNIST", "FashionMNIST/raw", _ZALANDO),
    DataName.cifar10: Source("CIFAR10", "cifar-10-batches-py", _TORONTO, "cifar-10-python.tar.gz"),
    DataName.cifar100: Source("CIFAR100", "cifar-100-python", _TORONTO, "cifar-100-python.tar.gz"),
}
_FIRST_LABELS = {DataName.mnist: [5, 0, 4, 1, 9], DataName.fashion_mnist: [9, 0, 0, 3, 0]}
"""First training labels; names and sizes of the files are equal in both data sets."""


def root_of(config: DataConfig) -> Path:
    """Returns the root folder of torchvision's layout."""
    return expanded("data" if config.root is None else config.root).absolute()


def find(config: DataConfig) -> Path | None:
    """Returns the folder that has the data set's files, or some of them; None if there is none.

    Looks in torchvision's folder and, for IDX files, in ``data.root`` itself or Debian's folder.
    """
    folder = root_of(config) / SOURCES[config.name].folder
    if config.name not in _FIRST_LABELS:
        return folder if os.path.isdir(folder) else None
    folders = [folder]
    if config.root is not None:
        folders.append(root_of(config))
    elif config.name is DataName.fashion_mnist:
        folders.append(_DEBIAN)
    return next((folder for folder in folders if any(_idx_file(folder, n) for n in _IDX)), None)


def read(config: DataConfig) -> tuple[Bytes, Labels]:
    """Returns pixels (N, C, H, W) and labels (N,): all training samples, then all test samples.

    Raises ``ConfigError`` if files are missing or damaged.
    """
    folder = find(config)
    if folder is None:
        raise missing(config, "have not been fetched")
    try:
        splits = _read_idx(folder) if config.name in _FIRST_LABELS else _read_cifar(config, folder)
        _check_not_confused(splits, config, folder)
        return _joined(splits, config.name)
    except FileError as error:
        raise damaged(config, folder, str(error)) from None
    except ConfigError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise damaged(config, folder, one_line(error)) from None


def missing(config: DataConfig, why: str) -> ConfigError:
    """Returns the error for absent files, which says where to get them and where to put them."""
    source, root = SOURCES[config.name], root_of(config)
    allowed = f"a folder with the files of {config.name}, which are not in {root} and {why}"
    files = source.archive or ", ".join(f"{name}.gz" for name in _IDX)
    target = root if source.archive else root / source.folder
    return _root_error(config, allowed, f"put {files} into {target}, from {source.page}")


def damaged(config: DataConfig, path: Path, why: str) -> ConfigError:
    """Returns the error for a damaged file or folder."""
    allowed = f"a folder with whole files of {config.name}, and {path} is damaged ({why})"
    return _root_error(config, allowed, "copy the files again or name another folder")


def _root_error(config: DataConfig, allowed: str, remedy: str) -> ConfigError:
    return ConfigError(format_option_error("data.root", config.root or "null", allowed, remedy))


def _idx_file(folder: Path, name: str) -> Path | None:
    paths = (folder / name, folder / f"{name}.gz")
    return next((path for path in paths if os.path.lexists(path)), None)


def _read_idx(folder: Path) -> _Splits:
    most = math.prod(KNOWN_DATASETS[DataName.mnist].shape) * KNOWN_DATASETS[DataName.mnist].train
    read = (_read_idx_file(folder, name, most + _IDX_HEADER) for name in _IDX)
    images, labels, test_images, test_labels = read
    return [(images, labels), (test_images, test_labels)]


def _read_idx_file(folder: Path, name: str, most: int) -> Bytes:
    """Reads LeCun's IDX format of bytes: 0, 0, 8, number of dimensions, sizes, values."""
    path = _idx_file(folder, name)
    if path is None:
        raise FileNotFoundError(f"{name} is missing")
    content = reading.read_inflated(path, most)
    dimensions = 3 if "images" in name else 1
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != start + math.prod(sizes):
        raise ValueError(f"{path.name}: no whole IDX file of {dimensions} dimensions")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def _read_cifar(config: DataConfig, folder: Path) -> _Splits:
    """Reads with torchvision, which compares checksums before it opens the pickled files."""
    dataset_class = getattr(import_torchvision().datasets, SOURCES[config.name].torchvision_class)
    for path in sorted(folder.iterdir()):  # torchvision would wait at a FIFO
        reading.check_file(path, _CIFAR_BYTES)
    try:
        splits = [dataset_class(folder.parent, train=train) for train in (True, False)]
    except RuntimeError:
        raise ValueError("a file in it is missing, or its checksum is wrong") from None
    return [(split.data.transpose(0, 3, 1, 2), np.array(split.targets)) for split in splits]


def _check_not_confused(splits: _Splits, config: DataConfig, folder: Path) -> None:
    """Raises ``ConfigError`` if files of MNIST are given as Fashion-MNIST, or the other way."""
    first = [int(label) for label in splits[0][1][:5]]
    for other, labels in _FIRST_LABELS.items():
        if labels == first and other is not config.name:
            allowed = f"a folder with files of {config.name}, and those in {folder} are {other}'s"
            raise _root_error(config, allowed, f"name another folder, or use data={other}")


def _joined(splits: _Splits, name: DataName) -> tuple[Bytes, Labels]:
    """Joins training and test set, after checks of their sizes and labels."""
    train, test, shape, classes = KNOWN_DATASETS[name]
    pixels = np.concatenate([pixels for pixels, _ in splits]).reshape(-1, *shape)
    labels = np.concatenate([labels for _, labels in splits]).astype(np.int64)
    if [len(labels) for _, labels in splits] != [train, test] or len(pixels) != len(labels):
        raise ValueError(f"not {train} and {test} samples of shape {list(shape)}")
    if labels.max() >= classes:
        raise ValueError(f"a label {labels.max()} among {classes} classes")
    return pixels, labels


def moments(
    counts_CV: npt.NDArray[np.int64], normalisation: NormalisationName
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Returns mean and deviation per channel of pixels 0 to 255, each (C, 1, 1).

    ``counts_CV`` has the number of training pixels of each of the 256 values; the moments of the
    training pixels are exact.
    """
    channels = len(counts_CV)
    if normalisation is NormalisationName.imagenet:
        moments = np.array(IMAGENET) * 255
    elif normalisation is NormalisationName.none:
        moments = np.array([[0.0] * channels, [255.0] * channels])
    else:
        values = np.arange(256)
        mean = counts_CV @ values / counts_CV.sum(1)
        squares = (counts_CV * (values - mean[:, np.newaxis]) ** 2).sum(1)
        moments = np.array([mean, np.sqrt(squares / counts_CV.sum(1))])
    mean_C, deviation_C = moments.astype(np.float32)
    deviation_C[deviation_C == 0] = 1  # a channel with one value becomes 0
    return mean_C[:, np.newaxis, np.newaxis], deviation_C[:, np.newaxis, np.newaxis]


def normalised(
    pixels_NCHW: Bytes, mean_C11: npt.NDArray[np.float32], deviation_C11: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Returns (pixels - mean) / deviation."""
    inputs = pixels_NCHW.astype(np.float32)
    inputs -= mean_C11
    inputs /= deviation_C11
    return inputs


def value_counts(pixels_NCHW: Bytes) -> npt.NDArray[np.int64]:
    """Returns how often each of the 256 values occurs in each channel, (C, 256)."""
    return np.array([_histogram(pixels_NCHW[:, c]) for c in range(pixels_NCHW.shape[1])])


def _histogram(pixels_NHW: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Counts the 256 values in chunks, because np.bincount converts its input to int64."""
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(pixels_NHW), 1024):
        counts += np.bincount(pixels_NHW[start : start + 1024].ravel(), minlength=256)
    return counts
