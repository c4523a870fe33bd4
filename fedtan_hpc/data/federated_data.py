"""The user's own data: what ``data.target`` returns, and folders of images.

``items`` reads the samples.  A data set here is map-style: it has a length, and an item at each
number below it, which is a pair of an input and a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ..config.enums import DataName
from ..config.errors import ConfigError, format_option_error, one_line
from ..config.path_options import expanded
from ..config.schema import DataConfig
from ..files import reading
from ..runtime import import_path
from ..runtime.torchvision_import import import_torchvision
from .partition import Indices


class MapDataset(Protocol):
    """A map-style data set, such as ``torch.utils.data.Dataset``, of pairs (input, target)."""

    def __len__(self) -> int:
        """Returns the number of items."""

    def __getitem__(self, index: int, /) -> Any:
        """Returns the pair at ``index``."""


@dataclass(frozen=True)
class FederatedData:
    """Data of one's own, for ``data=import``.

    Inputs are tensors, arrays, PIL images, or dicts or tuples of tensors; targets are class numbers
    from 0.  A data set's attribute ``targets``, if it has one, gives all targets without reading.
    An item is read with generators that are seeded by its number, so that it is always the same:
    random changes of training inputs belong in ``data.transform``.
    """

    train: MapDataset | None
    """Training samples of all clients; None if each client has a data set of its own."""
    test: MapDataset | None = None
    """Test samples.  None: those of the clients; without these a fifth is split off."""
    clients: Sequence[Any] | None = None
    """The natural partition, used by ``partition=natural``: an entry for each client.

    An entry is a data set, or indices into ``train``.  Or it is a pair of the client's training and
    test samples: data sets, or indices into ``train`` and into ``test``.
    """
    classes: int | None = None
    """Number of classes; None: from an attribute ``classes`` of the data, or the largest target."""


class Piece(NamedTuple):
    """A data set among those that make up the whole."""

    name: str
    """For messages: train, test, client 3, client 3's test."""
    items: MapDataset


@dataclass
class OwnData:
    """Pieces that follow each other in one numbering of all samples, and who has which."""

    pieces: list[Piece] = field(default_factory=list)
    size: int = 0
    """Number of all samples."""
    train: list[Indices] = field(default_factory=list)
    """Indices of the training samples, in parts."""
    test: list[Indices] = field(default_factory=list)
    clients: list[Indices] | None = None
    """Training samples of each natural client."""
    client_tests: dict[int, Indices] = field(default_factory=dict)
    """Test samples of those natural clients that have such."""
    classes: int | None = None

    def add(self, name: str, items: MapDataset) -> Indices:
        """Adds a piece; returns the numbers of its samples."""
        start, self.size = self.size, self.size + len(items)
        self.pieces.append(Piece(name, items))
        return np.arange(start, self.size)


def load_own(config: DataConfig, seed: int) -> OwnData:
    """Opens the user's data, without reading samples.

    Raises ``ConfigError`` if the target cannot be called or returns something else, or the folder
    does not have the expected layout.
    """
    if config.name is DataName.folder:
        return _assembled(_from_folder(config), "data.root", config.root)
    make = import_path.resolve("data.target", config.target or "", "data")
    root = None if config.root is None else str(expanded(config.root))
    given = import_path.accepted(make, {"seed": seed, **({} if root is None else {"root": root})})
    try:
        data = make(**{**given, **config.options})
    except (Exception, SystemExit) as error:
        allowed = f"a callable that takes data.options={config.options}"
        raise _target_error(config, allowed, f"it raised {one_line(error)}") from error
    if isinstance(data, tuple) and len(data) == 2:
        data = FederatedData(*data)
    if not isinstance(data, FederatedData):
        allowed = "a callable that returns a fedtan_hpc.FederatedData or a tuple (train, test)"
        raise _target_error(config, allowed, f"it returned a {type(data).__name__}")
    return _assembled(data, "data.target", config.target)


def _target_error(config: DataConfig, allowed: str, remedy: str) -> ConfigError:
    return ConfigError(format_option_error("data.target", config.target, allowed, remedy))


def _assembled(data: FederatedData, option: str, value: object) -> OwnData:
    """Numbers all samples; raises ``ConfigError`` for a part that is no data set."""
    own = OwnData(classes=data.classes)
    try:
        if data.classes is not None and not isinstance(data.classes, int):
            raise TypeError(f"classes is {data.classes!r}, not a whole number")
        train = _added(own, "train", data.train)
        test = _added(own, "test", data.test)
        if data.clients is None and train is None:
            raise TypeError("train is None, and there are no clients")
        if data.clients is not None:
            _add_clients(own, data.clients, train, test)
    except (TypeError, ValueError, IndexError) as error:
        allowed = "data sets with a length and items, and clients as documented"
        raise ConfigError(format_option_error(option, value, allowed, str(error))) from error
    if train is not None:
        own.train.insert(0, train)
    if test is not None:
        own.test.insert(0, test)
    return own


def _added(own: OwnData, name: str, items: MapDataset | None) -> Indices | None:
    if items is None:
        return None
    if not hasattr(items, "__len__") or not hasattr(items, "__getitem__"):
        raise TypeError(f"{name} is a {type(items).__name__}, not a data set with length and items")
    if not len(items):
        raise ValueError(f"{name} has no samples")
    return own.add(name, items)


def _add_clients(
    own: OwnData, clients: Sequence[Any], train: Indices | None, test: Indices | None
) -> None:
    if not isinstance(clients, Sequence) or not clients:
        raise TypeError("clients is not a list with an entry for each client")
    own.clients = []
    for number, entry in enumerate(clients):
        is_pair = isinstance(entry, tuple | list) and len(entry) == 2 and not _are_indices(entry)
        of_train, of_test = entry if is_pair else (entry, None)
        name = f"client {number}"
        if _are_indices(of_train):
            if train is None:
                raise TypeError(f"{name} is a list of indices, and train is None")
            own.clients.append(_selected(train, of_train, f"{name}: index into train"))
        elif train is not None:
            raise TypeError(f"{name} is a data set, and train is not None: give indices into train")
        else:
            numbers = _added(own, name, of_train)
            assert numbers is not None
            own.clients.append(numbers)
            own.train.append(numbers)
        if not len(own.clients[-1]):
            raise ValueError(f"{name} has no samples")
        if of_test is not None and _are_indices(of_test):
            if test is None:
                raise TypeError(f"the test samples of {name} are indices, and test is None")
            own.client_tests[number] = _selected(test, of_test, f"{name}: index into test")
        elif of_test is not None:
            numbers = _added(own, f"{name}'s test", of_test)
            assert numbers is not None
            own.client_tests[number] = numbers
            own.test.append(numbers)
    for what, of_clients in (("training", own.clients), ("test", [*own.client_tests.values()])):
        values, counts = np.unique(np.concatenate([*of_clients, []]), return_counts=True)
        if len(values) and counts.max() > 1:
            sample = int(values[counts.argmax()])
            raise ValueError(f"{what} sample {sample} is given twice to clients")


def _are_indices(entry: Any) -> bool:
    if isinstance(entry, np.ndarray):
        return entry.ndim == 1 and entry.dtype.kind in "iu"
    if isinstance(entry, torch.Tensor):
        return entry.dim() == 1 and entry.dtype in (torch.int64, torch.int32)
    is_list = isinstance(entry, list | tuple | range)
    return is_list and all(isinstance(each, int | np.integer) for each in entry)


def _selected(numbers: Indices, indices: Any, what: str) -> Indices:
    chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
    wrong = chosen[(chosen < 0) | (chosen >= len(numbers))]
    if len(wrong):
        raise IndexError(f"{what} {wrong[0]} is not below {len(numbers)}")
    return numbers[chosen]


def _from_folder(config: DataConfig) -> FederatedData:
    """Opens train/CLASS/*, test/CLASS/* or CLASS/*, or one of these for each client of the folder.

    A folder of clients is one whose subfolders all have a folder train.
    """
    root = expanded(config.root or "").absolute()
    if not root.is_dir():
        allowed = "a folder with images in train/CLASS, CLIENT/train/CLASS or CLASS"
        raise _root_error(config, allowed, f"there is no folder {root}")
    names = _subfolders(root)
    if "train" in names:
        train = _images(config, root / "train")
        test = _images(config, root / "test", train.class_to_idx) if "test" in names else None
        return FederatedData(train, test, classes=len(train.classes))
    if names and all((root / name / "train").is_dir() for name in names):
        return _clients_from_folder(config, root, names)
    train = _images(config, root)
    return FederatedData(train, classes=len(train.classes))


def _clients_from_folder(config: DataConfig, root: Path, names: Sequence[str]) -> FederatedData:
    """Opens one data set for each client; a class has one number with all clients."""
    every = {each for name in names for each in _subfolders(root / name / "train")}
    numbers = {name: number for number, name in enumerate(sorted(every))}
    clients = []
    for name in names:
        train = _images(config, root / name / "train", numbers)
        has_test = (root / name / "test").is_dir()
        test = _images(config, root / name / "test", numbers) if has_test else None
        clients.append((train, test) if test is not None else train)
    return FederatedData(None, clients=clients, classes=len(numbers))


def _subfolders(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.is_dir() and each.name[0] != ".")


def _images(config: DataConfig, folder: Path, numbers: Mapping[str, int] | None = None) -> Any:
    """Returns torchvision's ImageFolder of ``folder``, with classes of the given numbers.

    Raises ``ConfigError`` if there are no images, or classes without a number.
    """
    datasets = import_torchvision().datasets
    unknown = [] if numbers is None else [n for n in _subfolders(folder) if n not in numbers]
    if unknown:
        allowed = (
            f"a folder whose test classes are those of its training images: {list(numbers or {})}"
        )
        raise _root_error(config, allowed, f"{folder} also has {unknown[0]}")

    class Images(datasets.ImageFolder):  # type: ignore[misc, name-defined]
        def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
            """Returns the classes of all clients, of which this folder may lack some."""
            if numbers is None:
                return super().find_classes(directory)  # type: ignore[no-any-return]
            return list(numbers), dict(numbers)

    try:
        return Images(str(folder), allow_empty=numbers is not None, loader=_load_image)
    except (FileNotFoundError, OSError) as error:
        allowed = "a folder with images in train/CLASS, CLIENT/train/CLASS or CLASS"
        raise _root_error(config, allowed, one_line(error)) from None


def _load_image(path: str) -> Any:
    """Returns an image of 8 bits with three channels; one of more bits unchanged (``items``)."""
    from PIL import Image

    with reading.opened(Path(path)) as file, Image.open(file) as image:
        image.load()
        return image if image.mode[0] in "IF" else image.convert("RGB")


def _root_error(config: DataConfig, allowed: str, remedy: str) -> ConfigError:
    return ConfigError(format_option_error("data.root", config.root, allowed, remedy))
