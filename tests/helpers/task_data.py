"""Data, networks and a task of a user's own for tasks other than classification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtan_hpc import FederatedData, Task

HERE = "tests.helpers.task_data"
IGNORED = 255
SIZES = ((21, 6), (34, 9), (17, 5))
"""Training and test samples of three clients."""


def mask_of(image: Tensor) -> Tensor:
    """Returns the classes of an image's pixels, 0 to 2; (3, H, W) to (H, W)."""
    return (image[0] > 0.5).long() + (image[1] > 1)


class Made:
    """Items (input, target) of one kind, which follow from a seed."""

    def __init__(self, kind: str, size: int, seed: int, fault: str = "") -> None:
        self.kind, self.fault = kind, fault
        rng = np.random.default_rng(seed)
        self.signs = rng.integers(2, size=(size, 3))
        self.noise = rng.standard_normal((size, 3, 6, 4)).astype(np.float32)
        self.ignored = rng.random((size, 6, 4)) < 0.1

    def __len__(self) -> int:
        return len(self.signs)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if index >= len(self):
            raise IndexError(index)
        signs, noise = self.signs[index], self.noise[index]
        image = torch.from_numpy(noise + signs[:, None, None])
        if self.kind == "masks":
            mask = mask_of(image).numpy().astype(np.uint8)
            mask[self.ignored[index]] = IGNORED
            if self.fault and index == 3:
                mask[0, 0] = 3
            return image, mask
        if self.kind == "labels":
            labels = signs.astype(np.float64)
            return image, labels[:2] if self.fault and index == 3 else labels
        if self.kind == "class":
            return image, int(signs[0])
        value = float(signs @ np.array([1.0, -2.0, 0.5]) + noise.mean())
        if self.fault and index == 3:
            value = float("inf")
        return image, value if self.kind == "number" else torch.tensor([value, -3 * value + 1])


def sites(kind: str, fault: str = "", classes: int | None = 3) -> FederatedData:
    """Three clients with test samples of their own."""
    clients = [
        (Made(kind, train, 10 + k, fault), Made(kind, test, 20 + k))
        for k, (train, test) in enumerate(SIZES)
    ]
    known = classes if kind == "masks" else None
    return FederatedData(None, clients=clients, classes=known)


def pixels(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Scores for each pixel."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, classes, 1),
    )


class WithAuxiliary(nn.Module):
    """Returns scores and auxiliary scores, as torchvision's networks for segmentation do."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(channels, 5, 3, padding=1), nn.BatchNorm2d(5))
        self.scores, self.more = nn.Conv2d(5, classes, 1), nn.Conv2d(5, classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.features(x)
        return {"out": self.scores(features), "aux": self.more(features)}


def with_auxiliary(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Makes the network."""
    return WithAuxiliary(shape[0], classes)


def of_numbers(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Scores for a whole image."""
    return nn.Sequential(nn.Flatten(), nn.Linear(72, classes), nn.BatchNorm1d(classes))


class Quantile(Task):
    """Quantile regression, a user's own task: the pinball loss at a quantile."""

    def __init__(self, quantile: float = 0.5, fault: str = "") -> None:
        self.quantile, self.fault = quantile, fault

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        errors = targets.reshape(output.shape) - output
        losses = torch.maximum(self.quantile * errors, (self.quantile - 1) * errors).mean(1)
        return losses.mean() if self.fault == "losses" else losses

    def sums(self, output: Tensor, targets: Tensor) -> Tensor:
        if self.fault == "sums":
            raise IndexError("no such column")
        below = (targets.reshape(output.shape) <= output).double().mean(1, keepdim=True)
        return below

    def metrics(self, sums: Tensor, samples: float) -> Mapping[str, Any]:
        return {"below": sums[0] / samples}


def no_task() -> int:
    """Returns something else."""
    return 3


def with_target(image: Tensor, target: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Turns an image and its mask upside down at random."""
    if torch.rand(()) < 0.5:
        return image.flip(-2), target[::-1].copy()
    return image, target
