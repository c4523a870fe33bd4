"""Data as a user's own, for ``data=import`` and ``data=folder``, and changes of inputs."""

from __future__ import annotations

import random
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
    """Has one bad item, number 7."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = super().__getitem__(index)
        if index != 7:
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
    pairs = [(train, Blobs(12, 20 + k, kind=kind)) for k, train in enumerate(trains)]
    return FederatedData(None, clients=pairs)


def faulty(fault: str, kind: str = "bytes") -> tuple[Blobs, Blobs]:
    """Training samples with a bad one."""
    train = Faulty(60, 0, kind=kind)
    train.fault = fault
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


def overlapping() -> FederatedData:
    """Two clients with one sample in common."""
    return FederatedData(*pair(), clients=[range(6), range(5, 20)])
