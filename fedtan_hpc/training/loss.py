"""The loss of a batch as training takes it: in full or mixed precision, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data.batching import Samples

Mean = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Of a model, inputs (N, ...) and labels (N,): the mean loss, 0-d."""


def mean_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of ``model``."""
    return cross_entropy(model(inputs), labels)


def loss_of(model: nn.Module, batch: Samples) -> Tensor:
    """The same of a batch, plainly."""
    return mean_loss(model, batch.inputs, batch.labels)


@dataclass(frozen=True)
class Loss:
    """The loss of training steps."""

    mixed: bool = False
    """Whether matrix products and convolutions are in bfloat16; statistics and sums never are."""
    compiled: Mean | None = None
    """``mean_loss`` by torch.compile; its backward pass is compiled with it."""
    compile_seconds: float = 0.0

    def __call__(self, model: nn.Module, batch: Samples, eager: bool = False) -> Tensor:
        """Of ``model`` on ``batch``, 0-d; ``eager`` where ranks must run layers in one order."""
        function = mean_loss if eager or self.compiled is None else self.compiled
        with self.precision(batch.inputs.device):
            return function(model, batch.inputs, batch.labels)

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        """In which forward passes run."""
        if not self.mixed:
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)
