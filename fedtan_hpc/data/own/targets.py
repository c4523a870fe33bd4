"""Targets: class numbers, and others as the task needs them.  Used by ``items``.

Shapes: H x W pixels, C classes, D regressed values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...config.enums import TaskName


@dataclass(frozen=True)
class TargetRule:
    """Says what the targets of a task are, and makes tensors of them."""

    task: TaskName
    classes: int | None
    """Number of classes; None: not known, or the task has none."""
    ignore_index: int | None

    def tensor(self, target: Any) -> Tensor:
        """Returns a target as a tensor; raises ``ValueError`` in words if it cannot be one.

        A mask (H, W) is int64, labels (C,) and regressed values () or (D,) are float32.
        """
        value = _tensor(target)
        if self.task is TaskName.segmentation:
            return self._mask(value)
        if self.task is TaskName.multilabel:
            return self._labels(value)
        if self.task is TaskName.regression:
            value = value.float()
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError("the target has a value that is not finite")
        return value

    def classes_of(self, target: Tensor) -> int:
        """Returns the number of a network's outputs, as far as a target tells it."""
        if self.classes is not None:
            return self.classes
        return len(target) if target.dim() == 1 else 1

    def _mask(self, value: Tensor) -> Tensor:
        if value.is_floating_point() or value.is_complex():
            raise ValueError(f"the target is a mask of {value.dtype}, not of class numbers")
        if value.dim() > 2 and len(value) == 1:
            value = value[0]
        if value.dim() < 1:
            raise ValueError("the target is a number, and a mask has one for each pixel")
        value = value.long()
        wrong = (value < 0) | (value >= (self.classes or 1))
        if self.ignore_index is not None:
            wrong &= value != self.ignore_index
        if bool(wrong.any()):
            number = int(value[wrong][0])
            allowed = f"0 to {(self.classes or 1) - 1}"
            raise ValueError(
                f"the target has the class number {number}, and allowed are {allowed}"
                f"{self._or_ignored()}"
            )
        return value

    def _labels(self, value: Tensor) -> Tensor:
        value = value.float()
        expected = self.classes or len(value.reshape(-1))
        if value.dim() != 1 or len(value) != expected:
            raise ValueError(
                f"the target has the shape {tuple(value.shape)}, and not a 0 or 1 for each of "
                f"{expected} classes"
            )
        wrong = ~((value >= 0) & (value <= 1))
        if self.ignore_index is not None:
            wrong &= value != self.ignore_index
        if bool(wrong.any()):
            raise ValueError(
                f"the target has the value {float(value[wrong][0])}, and allowed are 0 and 1"
                f"{self._or_ignored()}"
            )
        return value

    def _or_ignored(self) -> str:
        if self.ignore_index is None:
            return " (task.ignore_index=N lets N pass)"
        return f" and task.ignore_index, {self.ignore_index}"


def _tensor(target: Any) -> Tensor:
    if isinstance(target, Tensor):
        return target.detach().as_subclass(Tensor)
    if hasattr(target, "getbands"):  # a PIL image
        target = np.asarray(target)
    try:
        array = np.asarray(target)
        if array.dtype.kind not in "biuf":
            raise TypeError
        signed = array.astype(np.int64) if array.dtype.kind == "u" else array
        return torch.from_numpy(np.require(signed, requirements=("C", "W", "O")).copy())
    except (TypeError, ValueError):
        kind = type(target).__name__
        raise ValueError(f"the target is a {kind}, not a number, array or tensor") from None


def class_number(target: Any) -> int | None:
    """Returns a target as a class number; None if it is not a whole number >= 0."""
    if isinstance(target, Tensor | np.ndarray | np.generic):
        if target.ndim or not np.issubdtype(np.asarray(target).dtype, np.integer):
            return None
        target = target.item()
    return (
        target if isinstance(target, int) and not isinstance(target, bool) and target >= 0 else None
    )


def listed_targets(items: Any) -> Any:
    """Returns the targets of a data set by index; None if it does not tell those of its items.

    A subset and a concatenation of torch do, if what they are made of does.
    """
    if getattr(items, "target_transform", None) is not None:
        return None
    if isinstance(items, torch.utils.data.Subset):
        whole = listed_targets(items.dataset)
        return None if whole is None else [whole[index] for index in items.indices]
    if isinstance(items, torch.utils.data.ConcatDataset):
        parts = [listed_targets(part) for part in items.datasets]
        return None if any(part is None for part in parts) else [t for part in parts for t in part]
    targets = getattr(items, "targets", None)
    if targets is None or not hasattr(targets, "__len__") or len(targets) != len(items):
        return None
    return targets.tolist() if isinstance(targets, Tensor | np.ndarray) else targets
