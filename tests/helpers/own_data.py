"""Data as a user's own, for ``data=import`` and ``data=folder``, and changes of inputs."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from fedtan_hpc import FederatedData

HERE = "tests.helpers.own_data"


class Blobs(Dataset[Any]):
    """Images of bytes of one colour for each class, with noise; ``kind`` says what an item is."""

    def __init__(self, size: int, seed: int, classes: int = 3, kind: str = "bytes") -> None:
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(classes, size=size)
        self.labels[:classes] = np.arange(classes)
        noise = rng.integers(60, size=(size, 12, 10, 3))
        colours = np.array([[0, 90, 180], [180, 0, 90], [90, 180, 0], [180, 180, 0]])
        self.pixels = (colours[self.labels][:, None, None, :] + noise).astype(np.uint8)
        self.kind = kind

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if index >= len(self):
            raise IndexError(index)
        pixels, label = self.pixels[index], int(self.labels[index])
        if self.kind == "bytes":
            return pixels, label
        if self.kind == "image":
            from PIL import Image

            return Image.fromarray(pixels), np.int32(label)
        values: Tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        if self.kind == "dict":
            return {"image": values, "mean": values.mean((1, 2))}, torch.tensor(label)
        if self.kind == "tuple":
            return (values, values.mean((1, 2))), label
        if self.kind == "random":
            return values + torch.rand(()) + random.random(), label
        array: Any = values.double().numpy()
        return array, label


class Listed(Blobs):
    """The same, which lists its targets."""

    @property
    def targets(self) -> list[int]:
        return [int(label) for label in self.labels]


class Faulty(Blobs):
    """Has one bad item."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = super().__getitem__(index)
        if index != self.bad % len(self):
            return image, label
        items: dict[str, Any] = {
            "shape": (image[:5], label),
            "infinite": (np.where(image > 0, np.nan, image), label),
            "target": (image, -1),
            "text": ("text", label),
            "single": image,
            "dies": (image, label),
        }
        item: tuple[Any, Any] = items[self.fault]
        return item

    fault = "shape"
    bad = 7


def pair(kind: str = "bytes", size: int = 90) -> tuple[Blobs, Blobs]:
    """A training and a test set."""
    return Blobs(size, 0, kind=kind), Blobs(30, 1, kind=kind)


def listed() -> FederatedData:
    """Training samples whose clients are lists of indices, and test samples of one client."""
    train = Listed(90, 0)
    return FederatedData(
        ConcatDataset([Subset(train, range(40)), Subset(train, range(40, 90))]),
        Listed(30, 1),
        clients=[(range(0, 20), range(10)), np.arange(20, 50), torch.arange(50, 90)],
        classes=4,
    )


def sites(kind: str = "image", tests: bool = True) -> FederatedData:
    """A data set for each of three clients, with test samples of its own."""
    trains = [Blobs(24 + 6 * k, 10 + k, kind=kind) for k in range(3)]
    if not tests:
        return FederatedData(None, clients=trains)
    pairs = [(train, Blobs(8 + 6 * k, 20 + k, kind=kind)) for k, train in enumerate(trains)]
    return FederatedData(None, clients=pairs)


def faulty(fault: str, kind: str = "bytes", bad: int = 7) -> tuple[Blobs, Blobs]:
    """Training samples with a bad one."""
    train = Faulty(60, 0, kind=kind)
    train.fault, train.bad = fault, bad
    return train, Blobs(30, 1, kind=kind)


def with_arguments(a: int, seed: int, root: str | None = None) -> tuple[Blobs, Blobs]:
    """Takes arguments of its own, the seed and the folder."""
    assert (a, seed, root) == (3, 5, "/somewhere")
    return pair()


def nothing() -> None:
    """Returns no data."""


def jittered(image: Any) -> Any:
    """Changes an image by numbers of all three generators."""
    factor = 1 - 0.2 * random.random() - 0.2 * np.random.random() - 0.2 * float(torch.rand(()))
    if isinstance(image, Tensor):
        return (image * factor).to(image.dtype)
    return (np.asarray(image) * factor).astype(np.uint8)


def made_float(image: Any) -> Any:
    """Makes another kind of input."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


class TwoInputs(nn.Module):
    """Takes an image and a vector, by name or by position."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.scores = nn.Linear(7, classes)

    def forward(self, image: Tensor, mean: Tensor) -> Tensor:
        features = self.features(image).mean((2, 3))
        scores: Tensor = self.scores(torch.cat([features, mean], 1))
        return scores


def two_inputs(shape: Any, classes: int) -> nn.Module:
    """Makes the network; the shape is a dict or a tuple of two."""
    assert len(shape) == 2
    return TwoInputs(classes)


def write_images(folder: Path, sizes: dict[str, int], seed: int, side: int = 12) -> None:
    """Writes PNG files of so many images to a folder for each class."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for number, (name, size) in enumerate(sizes.items()):
        (folder / name).mkdir(parents=True)
        for image in range(size):
            shape = (side + image % 3, side + 2, 3)
            pixels = (60 * number + rng.integers(80, size=shape)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{image}.png")


class Relabelled(Listed):
    """Lists other targets than its items have, as torchvision does with a target_transform."""

    @staticmethod
    def target_transform(label: int) -> int:
        return (label + 1) % 3

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = super().__getitem__(index)
        return image, self.target_transform(label)


def relabelled(declared: bool = True) -> tuple[Blobs, Blobs]:
    """Says so with the usual attribute, or not."""
    return (Relabelled if declared else Misleading)(60, 0), Blobs(30, 1)


class Misleading(Listed):
    """Lists wrong targets."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = super().__getitem__(index)
        return image, (label + 1) % 3


class InFile(Dataset[Any]):
    """Reads from one file, which it opens at its first item; reading takes a while."""

    def __init__(self, path: str, size: int) -> None:
        self.path, self.size = path, size
        self.file: Any = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if self.file is None:
            self.file = open(self.path, "rb")  # noqa: SIM115
        self.file.seek(64 * index)
        time.sleep(2e-4)
        values = np.frombuffer(self.file.read(64), np.uint8).astype(np.float32) / 255
        return torch.from_numpy(values.copy()).requires_grad_(), index % 3


def in_file(folder: str) -> FederatedData:
    """A subset of a file of random bytes; its tensors require gradients, which must not matter."""
    path = Path(folder) / "samples.bin"
    if not path.exists():
        rng = np.random.default_rng(0)
        path.write_bytes(rng.integers(256, size=64 * 120, dtype=np.uint8).tobytes())
    return FederatedData(Subset(InFile(str(path), 120), range(90)), InFile(str(path), 120))


def few_of_many() -> tuple[Blobs, None]:
    """Fewer test samples than classes."""
    return Blobs(22, 0, classes=4), None


def other_classes() -> FederatedData:
    """Sites whose class numbers mean different things."""
    clients = [Blobs(24, k) for k in range(2)]
    for client, names in zip(clients, (["cat", "dog", "owl"], ["ape", "cat", "owl"]), strict=True):
        client.classes = names  # type: ignore[attr-defined]
    return FederatedData(None, clients=clients)


def deep() -> tuple[Any, Any]:
    """Images of 16 bits."""
    from PIL import Image

    image = Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
    return [(image, k % 2) for k in range(20)], [(image, k % 2) for k in range(6)]


def many(clients: int = 8) -> FederatedData:
    """More clients than the default."""
    return FederatedData(None, clients=[Blobs(12, k) for k in range(clients)])


def of_two_classes() -> FederatedData:
    """Has three, and says two."""
    return FederatedData(*pair(), classes=2)


def with_an_empty_client(few: int = 0) -> FederatedData:
    """The second of three clients has too few samples."""
    return FederatedData(*pair(), clients=[range(20), range(20, 20 + few), range(40, 60)])


def sharing_tests() -> FederatedData:
    """Two clients with one test set."""
    return FederatedData(*pair(), clients=[(range(30), range(30)), (range(30, 60), range(30))])


def overlapping() -> FederatedData:
    """Two clients with one sample in common."""
    return FederatedData(*pair(), clients=[range(6), range(5, 20)])
