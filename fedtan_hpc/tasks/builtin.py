"""The built-in tasks: classification, several labels at once, segmentation and regression.

Every loss is a mean over samples of a sample's own loss, also with class weights, so that the
clients' losses weighted by p_k are that of the pooled data.  The values of the metrics are those of
torchmetrics; it has none that can be summed by client and by label in one message.

Shapes: N samples, C classes, D regressed values; pixels are any number of further dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..runtime.transfer import constant
from .task import Task


@dataclass(frozen=True)
class _Classes(Task):
    """Base class of the tasks with classes."""

    class_weights: Sequence[float] | None = None
    """A factor on the loss of each class."""
    label_smoothing: float = 0.0
    ignore_index: int | None = None
    """Target that counts neither in the loss nor in metrics."""

    def _weights(self, output: Tensor) -> Tensor | None:
        if self.class_weights is None:
            return None
        if torch.compiler.is_compiling():  # a constant of the graph
            return output.new_tensor(self.class_weights)
        return constant(tuple(self.class_weights), output.dtype, output.device)

    def mistake(self, output: Any, targets: Tensor, classes: int) -> str:
        """Returns the shape that class scores should have; empty if they have it."""
        expected = self._shape(targets, classes)
        return "" if tuple(output.shape) == expected else str(expected)

    def _shape(self, targets: Tensor, classes: int) -> tuple[int, ...]:
        return (len(targets), classes, *targets.shape[1:])


class Classification(_Classes):
    """One class for each sample: scores (N, C), targets (N,).  Loss: cross-entropy."""

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropies, (N,)."""
        weight, smoothing = self._weights(output), self.label_smoothing
        return F.cross_entropy(output, targets, weight, reduction="none", label_smoothing=smoothing)

    def sums(self, output: Tensor, targets: Tensor) -> Tensor:
        """Returns for each class whether it was found, and whether it is the target, (N, 2C)."""
        is_target = F.one_hot(targets, output.shape[1])
        is_right = (output.argmax(1) == targets).unsqueeze(1)
        return torch.cat([is_target * is_right, is_target], dim=1)

    def metrics(self, sums: Tensor, samples: float) -> dict[str, Any]:
        """Returns accuracy, and recall: of each class, and its mean over classes."""
        right_C, count_C = sums.chunk(2)
        recall_C = right_C / count_C
        return {
            "accuracy": right_C.sum() / count_C.sum(),
            "recall": recall_C.nanmean(),
            "recall_by_class": recall_C,
        }


class Segmentation(_Classes):
    """A class for each pixel: scores (N, C, ...), targets (N, ...).

    Loss: mean cross-entropy of the pixels of a sample.
    """

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean over each sample's pixels that count, (N,); 0 if none does."""
        is_counted = self._is_counted(targets)
        pixels = F.cross_entropy(
            output,
            targets if self.ignore_index is None else targets * is_counted,
            self._weights(output),
            reduction="none",
            label_smoothing=self.label_smoothing,
        ).flatten(1)
        if self.ignore_index is None:
            return pixels.mean(1)
        counted = is_counted.flatten(1)
        return (pixels * counted).sum(1) / counted.sum(1).clamp_min(1)

    def sums(self, output: Tensor, targets: Tensor) -> Tensor:
        """Returns pixels by class: right ones, predicted ones and true ones, (N, 3C)."""
        classes, predicted = output.shape[1], output.argmax(1)
        sample_N = torch.arange(len(targets), device=targets.device)
        sample = sample_N.view(-1, *[1] * (targets.dim() - 1)).expand_as(targets)
        keep = self._is_counted(targets)

        def by_class(values: Tensor, where: Tensor) -> Tensor:
            index = (sample * classes + values)[where]
            return torch.bincount(index, minlength=len(targets) * classes).view(-1, classes)

        is_right = keep & (predicted == targets)
        return torch.cat(
            [by_class(targets, is_right), by_class(predicted, keep), by_class(targets, keep)], dim=1
        )

    def metrics(self, sums: Tensor, samples: float) -> dict[str, Any]:
        """Returns intersection over union and Dice, means over the classes that occur.

        A class that is ignored is left out, because no pixel can be right with it.
        """
        right_C, predicted_C, true_C = sums.chunk(3)
        iou_C = right_C / (predicted_C + true_C - right_C)
        dice_C = 2 * right_C / (predicted_C + true_C)
        if self.ignore_index is not None and 0 <= self.ignore_index < len(iou_C):
            iou_C[self.ignore_index] = dice_C[self.ignore_index] = torch.nan
        return {
            "iou": iou_C.nanmean(),
            "dice": dice_C.nanmean(),
            "pixel_accuracy": right_C.sum() / true_C.sum(),
            "iou_by_class": iou_C,
        }

    def _is_counted(self, targets: Tensor) -> Tensor:
        if self.ignore_index is None:
            return torch.ones_like(targets, dtype=torch.bool)
        return targets != self.ignore_index


class Multilabel(_Classes):
    """Any of several labels for each sample: scores (N, C), targets (N, C) of 0 and 1.

    Loss: mean over labels of the binary cross-entropy; class weights are those of targets 1.
    """

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean over each sample's labels that count, (N,); 0 if none does."""
        is_counted = self._is_counted(targets)
        soft = targets * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
        values = F.binary_cross_entropy_with_logits(
            output, soft * is_counted, reduction="none", pos_weight=self._weights(output)
        )
        return (values * is_counted).sum(1) / is_counted.sum(1).clamp_min(1)

    def sums(self, output: Tensor, targets: Tensor) -> Tensor:
        """Returns for each label: found, falsely found and missed, (N, 3C)."""
        keep, found, true = self._is_counted(targets), output > 0, targets > 0.5
        return torch.cat([keep & found & true, keep & found & ~true, keep & ~found & true], dim=1)

    def metrics(self, sums: Tensor, samples: float) -> dict[str, Any]:
        """Returns F1: the mean over labels that occur, over all answers, and of each label."""
        found_C, false_C, missed_C = sums.chunk(3)
        f1_C = 2 * found_C / (2 * found_C + false_C + missed_C)
        wrong = (false_C + missed_C).sum()
        f1_micro = 2 * found_C.sum() / (2 * found_C.sum() + wrong)
        return {"f1": f1_C.nanmean(), "f1_micro": f1_micro, "f1_by_class": f1_C}

    def _shape(self, targets: Tensor, classes: int) -> tuple[int, ...]:
        return len(targets), classes

    def _is_counted(self, targets: Tensor) -> Tensor:
        if self.ignore_index is None:
            return torch.ones_like(targets, dtype=torch.bool)
        return targets != self.ignore_index


class Regression(Task):
    """Numbers: outputs and targets (N,) or (N, D).  Loss: mean squared error of a sample."""

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean over D of the squared errors, (N,)."""
        return self._errors(output, targets).square().mean(1)

    def sums(self, output: Tensor, targets: Tensor) -> Tensor:
        """Returns absolute and squared errors, targets and squared targets, (N, 4D)."""
        errors = self._errors(output, targets)
        values = targets.reshape(len(targets), -1)
        return torch.cat([errors.abs(), errors.square(), values, values.square()], dim=1)

    def metrics(self, sums: Tensor, samples: float) -> dict[str, Any]:
        """Returns mean absolute error and R^2, means over D."""
        absolute_D, squared_D, values_D, squares_D = sums.chunk(4)
        spread_D = squares_D - values_D.square() / samples
        return {
            "mae": absolute_D.mean() / samples,
            "r2": (1 - squared_D / spread_D).mean(),
        }

    def mistake(self, output: Any, targets: Tensor, classes: int) -> str:
        """Returns how many values there should be; empty if there are so many."""
        is_right = output.numel() == targets.numel() and len(output) == len(targets)
        return "" if is_right else str((len(targets), targets.numel() // len(targets)))

    def _errors(self, output: Tensor, targets: Tensor) -> Tensor:
        return (output.reshape(targets.shape) - targets).reshape(len(targets), -1)
