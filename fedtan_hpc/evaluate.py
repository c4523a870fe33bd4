"""Loss and accuracy on the test set, shared out over the ranks and summed exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from . import comm
from .data import Samples

_BATCH = 1024


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and the share of right answers, 0 to 1, over all samples."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples) -> Evaluation:
    """Judge ``model`` on the union of all ranks' ``samples`` (some ranks may have none)."""
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=samples.labels.device)
    for start in range(0, len(samples), _BATCH):
        batch = samples[start : start + _BATCH]
        scores = model(batch.inputs)
        totals[0] += cross_entropy(scores.double(), batch.labels, reduction="sum")
        totals[1] += (scores.argmax(1) == batch.labels).sum()
        totals[2] += len(batch)
    loss, right, count = comm.sum_over_ranks(totals).tolist()
    return Evaluation(loss / count, right / count)
