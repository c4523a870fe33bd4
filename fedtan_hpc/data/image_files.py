"""Image data sets that come in files: which they are, where they lie, and their bytes.

N samples of C channels and H x W pixels.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..config.enums import DataName
from ..config.schema import DataConfig
from ..config.errors import ConfigError, format_option_error, one_line
from ..config.dataset_info import KNOWN_DATA
from ..runtime.torchvision_import import import_torchvision

Bytes: TypeAlias = npt.NDArray[np.uint8]
Labels: TypeAlias = npt.NDArray[np.int64]
_Halves: TypeAlias = list[tuple[Bytes, npt.NDArray[Any]]]
"""Pixels and labels for training and for test."""

_IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


class Source(NamedTuple):
    """Where the files of a data set come from and lie, as torchvision has it."""

    kind: str
    """torchvision's class."""
    folder: str
    """Of the files, below torchvision's root."""
    files: tuple[str, ...]
    """What a person without a network has to get."""
    place: str
    """The folder for them, below torchvision's root."""
    page: str
    """Where to get them."""


def _idx_source(kind: str, page: str) -> Source:
    return Source(kind, f"{kind}/raw", tuple(f"{name}.gz" for name in _IDX), f"{kind}/raw", page)


_ZALANDO = "github.com/zalandoresearch/fashion-mnist or Debian's package dataset-fashion-mnist"
_TORONTO = "www.cs.toronto.edu/~kriz"
_MIRROR = "ossci-datasets.s3.amazonaws.com/mnist"
SOURCES = {
    DataName.mnist: _idx_source("MNIST", _MIRROR),
    DataName.fashion_mnist: _idx_source("FashionMNIST", _ZALANDO),
    DataName.cifar10: Source(
        "CIFAR10", "cifar-10-batches-py", ("cifar-10-python.tar.gz",), "", _TORONTO
    ),
    DataName.cifar100: Source(
        "CIFAR100", "cifar-100-python", ("cifar-100-python.tar.gz",), "", _TORONTO
    ),
}
_FIRST_LABELS = {DataName.mnist: [5, 0, 4, 1, 9], DataName.fashion_mnist: [9, 0, 0, 3, 0]}
"""Of the training samples; the names of the files, and all sizes in them, are the same."""


def root_of(config: DataConfig) -> Path:
    """torchvision's root."""
    return Path("data" if config.root is None else config.root).expanduser().absolute()


def find(config: DataConfig) -> Path | None:
    """The folder that has the files of the data set, or some of them.

    It is torchvision's; for IDX files also ``data.root`` itself, and Debian's.
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
    """Pixels (N, C, H, W) and labels (N,): all training samples, then all test samples.

    Raises ``ConfigError`` if files are missing or damaged.
    """
    folder = find(config)
    if folder is None:
        raise missing(config, "have not been fetched")
    try:
        halves = _read_idx(folder) if config.name in _FIRST_LABELS else _read_cifar(config, folder)
        _check_not_another(halves, config, folder)
        return _joined(halves, config.name)
    except ConfigError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise damaged(config, folder, one_line(error)) from None


def missing(config: DataConfig, why: str) -> ConfigError:
    """What to put where, if the files cannot be had."""
    source, root = SOURCES[config.name], root_of(config)
    allowed = f"a folder with the files of {config.name}, which are not in {root} and {why}"
    remedy = f"put {', '.join(source.files)} into {root / source.place}, from {source.page}"
    return ConfigError(format_option_error("data.root", config.root or "null", allowed, remedy))


def damaged(config: DataConfig, path: Path, why: str) -> ConfigError:
    """A file or folder that is not as it should be."""
    allowed = f"a folder with whole files of {config.name}, and {path} is damaged ({why})"
    remedy = "copy the files again or name another folder"
    return ConfigError(format_option_error("data.root", config.root or "null", allowed, remedy))


def _idx_file(folder: Path, name: str) -> Path | None:
    paths = (folder / name, folder / f"{name}.gz")
    return next((path for path in paths if os.path.isfile(path)), None)


def _read_idx(folder: Path) -> _Halves:
    images, labels, test_images, test_labels = (_read_idx_file(folder, name) for name in _IDX)
    return [(images, labels), (test_images, test_labels)]


def _read_idx_file(folder: Path, name: str) -> Bytes:
    """An array of bytes in LeCun's format: 0, 0, 8, number of dimensions, sizes, values."""
    path = _idx_file(folder, name)
    if path is None:
        raise FileNotFoundError(f"{name} is missing")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name}: {error}") from None
    dimensions = 3 if "images" in name else 1
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != start + math.prod(sizes):
        raise ValueError(f"{path.name}: no whole IDX file of {dimensions} dimensions")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def _read_cifar(config: DataConfig, folder: Path) -> _Halves:
    """By torchvision, which compares checksums before it opens the pickled files."""
    kind = getattr(import_torchvision().datasets, SOURCES[config.name].kind)
    try:
        halves = [kind(folder.parent, train=train) for train in (True, False)]
    except RuntimeError:
        raise ValueError("a file in it is missing, or its checksum is wrong") from None
    return [(half.data.transpose(0, 3, 1, 2), np.array(half.targets)) for half in halves]


def _check_not_another(halves: _Halves, config: DataConfig, folder: Path) -> None:
    """MNIST's files are not taken for Fashion-MNIST's, nor these for those."""
    first = [int(label) for label in halves[0][1][:5]]
    for other, labels in _FIRST_LABELS.items():
        if labels == first and other is not config.name:
            allowed = f"a folder with files of {config.name}, and those in {folder} are {other}'s"
            remedy = f"name another folder, or use data={other}"
            raise ConfigError(format_option_error("data.root", config.root or "null", allowed, remedy))


def _joined(halves: _Halves, name: DataName) -> tuple[Bytes, Labels]:
    """One array each, if they are what is known of the data set."""
    train, test, shape, classes = KNOWN_DATA[str(name)]
    pixels = np.concatenate([pixels for pixels, _ in halves]).reshape(-1, *shape)
    labels = np.concatenate([labels for _, labels in halves]).astype(np.int64)
    if [len(labels) for _, labels in halves] != [train, test] or len(pixels) != len(labels):
        raise ValueError(f"not {train} and {test} samples of shape {list(shape)}")
    if labels.max() >= classes:
        raise ValueError(f"a label {labels.max()} among {classes} classes")
    return pixels, labels
