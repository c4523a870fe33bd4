"""Two ways to train on a folder of images: a streamed round of the job, and torch's DataLoader."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler

from fedtan_hpc.config.schema import Config
from fedtan_hpc.data.image_files import IMAGENET
from fedtan_hpc.job.setup import prepare
from fedtan_hpc.models import factory
from fedtan_hpc.runtime.device import DevicePlacement
from fedtan_hpc.runtime.torchvision_import import import_torchvision

_ENDLESS = 10**9


class Way(NamedTuple):
    """A way to train: ``run`` takes E steps, ``close`` ends the workers."""

    run: Callable[[], object]
    close: Callable[[], object]


class TinyNetwork(nn.Module):
    """Scores from the means of the channels: it takes so little time that loading is the bound."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.bn, self.scores = nn.BatchNorm1d(channels), nn.Linear(channels, classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Returns scores of the classes."""
        scores: Tensor = self.scores(self.bn(images_BCHW.mean((2, 3))))
        return scores


def tiny(shape: Sequence[int], classes: int) -> nn.Module:
    """Makes the tiny network."""
    return TinyNetwork(shape[0], classes)


def write_images(root: Path, images: int, classes: int = 4) -> None:
    """Writes ``images`` smooth JPEG files of 320x280 pixels for training, and a few for tests."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(images + 2 * classes):
        part = "train" if number < images else "test"
        folder = root / part / f"class{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(256, size=(35, 40, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((320, 280), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.jpg", quality=90)


def streamed(config: Config, placement: DevicePlacement) -> Way:
    """Returns the round of the job: all its steps, without evaluation."""
    trainer = prepare(config, placement)
    numbers = itertools.count(1)
    return Way(lambda: trainer.round(next(numbers)), trainer.store.close)


def plain(config: Config, placement: DevicePlacement) -> Way:
    """Returns a loop as a user writes it, with the same network, transforms, SGD and workers.

    An epoch has no end, so that workers read ahead all the time, as those of the job do.
    """
    dataset = _image_folder(config)
    loader = DataLoader(
        dataset,
        config.batch_size,
        sampler=RandomSampler(dataset, num_samples=_ENDLESS),
        num_workers=config.data.workers or 0,
        persistent_workers=bool(config.data.workers),
        multiprocessing_context="fork" if config.data.workers else None,
        pin_memory=placement.device.type == "cuda",
    )
    batches = [iter(loader)]
    order = torch.channels_last if config.channels_last else torch.contiguous_format
    size = config.data.image_size
    model = factory.build(config.model, (3, size, size), len(dataset.classes), seed=0)
    model = model.to(placement.device, memory_format=order).train()  # type: ignore[call-overload]
    sgd = config.optimizer

    def run() -> None:
        optimizer = torch.optim.SGD(
            model.parameters(), sgd.lr, sgd.momentum, weight_decay=sgd.weight_decay
        )
        for _ in range(config.local_steps):
            images, labels = next(batches[0])
            images = images.to(placement.device, memory_format=order, non_blocking=True)
            optimizer.zero_grad()
            cross_entropy(model(images), labels.to(placement.device)).backward()
            optimizer.step()

    return Way(run, batches.clear)


def _image_folder(config: Config) -> Any:
    torchvision = import_torchvision()
    from torchvision.transforms import v2  # type: ignore[import-untyped]

    steps = [
        v2.RandomResizedCrop(config.data.image_size, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*IMAGENET),
    ]
    root = Path(config.data.root or "")
    folder = root / "train" if (root / "train").is_dir() else root
    return torchvision.datasets.ImageFolder(str(folder), v2.Compose(steps))
