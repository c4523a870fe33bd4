"""Tasks with targets, inputs and metrics of unusual kinds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedtan_hpc
from fedtan_hpc import FederatedData, Task, cli
from fedtan_hpc.config.errors import ConfigError, RunError
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.data import datasets
from fedtan_hpc.evaluation.trackers import scalars
from fedtan_hpc.job.dry_run import dry_run
from fedtan_hpc.job.setup import prepare
from fedtan_hpc.tasks.objective import Objective
from tests.helpers.rounds import CPU

HERE = __name__
BASE = ["rounds=1", "local_steps=2", "batch_size=5", "eval_every=1", "precision=float64"]
BASE += ["partition=natural", "data=import", f"data.target={HERE}:sites"]
FEW = np.random.default_rng(0).standard_normal((40, 2, 4, 5, 3))


class Named(list[tuple[Any, Any]]):
    """Items whose data set names its classes."""

    def __init__(self, items: list[tuple[Any, Any]], classes: list[str]) -> None:
        super().__init__(items)
        self.classes = classes


def volume(n: int) -> tuple[Any, Any]:
    """A volume in float64, and a mask in which class 9 is ignored."""
    mask = (FEW[n, 0] > 0.3).astype(np.uint8)
    mask[0, 0] = 9
    return FEW[n], mask


KINDS: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "volumes": volume,
    "dicts": lambda n: ({"a": FEW[n, 0, 0, 0], "b": FEW[n, 1, 0]}, np.float64(3 + FEW[n].max())),
    "ranks": lambda n: (FEW[n, 0, 0], 1 + n % 3),
    "mixed": lambda n: (FEW[n, 0, 0], 1.5 if n % 2 == 0 else 2),
    "wholes": lambda n: (FEW[n, 0, 0], np.zeros(2, np.int64) if n % 2 == 0 else np.zeros(2)),
    "classes": lambda n: (FEW[n, 0], n % 2),
    "empty masks": lambda n: (FEW[n, :, 0], np.zeros((5, 3), np.int64)),
}


def sites(kind: str, classes: int | None = None, names: str = "") -> FederatedData:
    """Three clients of unequal sizes, each with two test samples; its names are letters."""
    items, clients = [KINDS[kind](n) for n in range(24)], []
    for k, (first, end) in enumerate(((0, 4), (4, 12), (12, 24))):
        parts = items[first : end - 2], items[end - 2 : end]
        letters = list(names if k else names[::-1])
        clients.append(parts if not names else tuple(Named(part, letters) for part in parts))
    return FederatedData(None, clients=clients, classes=classes)


def of_volumes(shape: tuple[int, ...], classes: int) -> nn.Module:
    stem = nn.Conv3d(shape[0], 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU()
    return nn.Sequential(*stem, nn.Conv3d(4, classes, 1))


class OfDicts(nn.Module):
    """Takes two inputs, and returns two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(18, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, 1)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        hidden = self.stem(torch.cat([a, b.flatten(1)], dim=1))
        return {"value": self.head(hidden.relu()), "hidden": hidden}


class Logarithm(Task):
    """A loss that is defined for positive targets only."""

    def __init__(self, **metrics: Any) -> None:
        self.named = metrics

    def losses(self, output: Any, targets: Tensor) -> Tensor:
        errors = output["value"].squeeze(1) - targets.log()
        losses: Tensor = errors.square() + 0.1 * output["hidden"].square().mean(1)
        return losses

    def sums(self, output: Any, targets: Tensor) -> Tensor:
        is_below: Tensor = targets.log() < output["value"].squeeze(1)
        return is_below.unsqueeze(1)

    def metrics(self, sums: Tensor, samples: float) -> Mapping[str, Any]:
        return {"array": sums.numpy(), "unknown": None, "below": sums[0] / samples, **self.named}


class FromOne(Task):
    """Classes that are numbered from 1; it refuses others, and whole numbers as fractions."""

    def losses(self, output: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets - 1, reduction="none")


class Fractions(Task):
    """Refuses whole numbers."""

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        if not targets.is_floating_point():
            raise TypeError(f"targets are {targets.dtype}")
        return (output.squeeze(1) - targets).square()


def turned(image: Tensor, target: int) -> tuple[Any, Any]:
    """Changes a class."""
    return image, 1 - target


JOBS = {
    "volumes": ["task=segmentation", "task.ignore_index=9", "data.options={kind: volumes}"],
    "dicts": ["task=import", f"task.target={HERE}:Logarithm", "data.options={kind: dicts}"],
}
JOBS["volumes"] += ["data.options.classes=2", "model=import", f"model.target={HERE}:of_volumes"]
JOBS["dicts"] += ["model=import", f"model.target={HERE}:OfDicts"]


def composed(*words: str) -> Config:
    [config] = cli.compose([*BASE, *words])
    check(config)
    return config


@pytest.mark.parametrize("job", JOBS)
def test_padding_is_no_target_and_inputs_may_be_wide(job: str, tmp_path: Path) -> None:
    """Also padding has a loss, which must be finite though it does not count."""
    found = []
    for mode in ("sequential", "stacked"):
        options = [*JOBS[job], f"cohort.mode={mode}", f"run_dir={tmp_path / mode}"]
        fedtan_hpc.run(composed(*options), callbacks=[])
        [*_, line] = (tmp_path / mode / "rounds.jsonl").read_text().splitlines()
        found.append({k: v for k, v in json.loads(line).items() if k.startswith(("tr", "test_"))})
    one_by_one, stacked = found
    assert scalars(stacked) == pytest.approx(scalars(one_by_one), rel=1e-10)
    if job == "dicts":
        assert one_by_one["test_unknown"] is None
        assert one_by_one["test_array"] == [6 * one_by_one["test_below"]]


def test_a_rank_without_clients_runs_a_target_that_exists() -> None:
    options = composed("task=import", f"task.target={HERE}:FromOne", "data.options={kind: ranks}")
    dummy = prepare(options, CPU).store.dummy()
    assert not dummy.inputs.any()
    assert dummy.labels.tolist() == [1]


def test_a_users_targets_have_one_type() -> None:
    options = composed("task=import", f"task.target={HERE}:Fractions", "data.options={kind: mixed}")
    dataset = datasets.load(options.data, 0, options.task)
    targets = dataset.take(np.array([1, 3])).labels  # both are whole numbers
    assert (targets.dtype, targets.tolist()) == (torch.float64, [2, 2])


def test_regression_ignores_names_of_classes() -> None:
    words = "task=regression", "data.options={kind: mixed, names: abc}"
    dataset = datasets.load(composed(*words).data, 0, composed(*words).task)
    assert (dataset.classes, dataset.names) == (1, None)


METRICS: dict[str, dict[str, Any]] = {
    "text": {"metric": "x"},
    "nested list": {"metric": [[1.0], [2.0]]},
    "of the loss": {"loss": 1.0},
    "accuracy": {"accuracy": [0.5, 1.0]},
}


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_is_a_number_or_a_list(kind: str) -> None:
    """Otherwise the job tells before it trains."""
    output = {"value": torch.zeros(2, 1), "hidden": torch.zeros(2, 6)}
    wrong = Objective(Logarithm(**METRICS[kind])).wrong_sizes(output, torch.ones(2))
    assert f"ValueError: the metric {next(iter(METRICS[kind]))} " in wrong


def test_a_task_is_tried_with_networks_without_values() -> None:
    """Those of torchvision are made without memory."""
    words = "data=digits", "data.target=null", "partition=iid", "task=import"
    network = "model=torchvision", "model.name=resnet18", "model.small_input=true"
    with pytest.raises(ConfigError, match=r"^task.target=.* it raised IndexError"):
        dry_run(composed(*words, *network, f"task.target={HERE}:FromOne"))


MASKS = ["task=segmentation", "model=unet"]
MISTAKES = {
    "one class": ([*MASKS, "data.options={kind: empty masks, classes: 1}"], "two classes or more"),
    "other names": (
        [*MASKS, "data.options={kind: empty masks, names: ab}"],
        "some have ['b', 'a']",
    ),
    "fractions": (
        ["task=import", f"task.target={HERE}:Fractions", "data.options={kind: wholes}"],
        "has the shape (2,) (torch.float64), and the first (2,) (torch.int64)",
    ),
    "changed class": (
        ["data.options={kind: classes}", f"data.transform={HERE}:turned"],
        "data.transform changed its target",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, tmp_path: Path) -> None:
    words, part = MISTAKES[mistake]
    options = composed(*words, f"run_dir={tmp_path}")
    with pytest.raises((ConfigError, RunError)) as caught:
        fedtan_hpc.run(options, callbacks=[])
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
