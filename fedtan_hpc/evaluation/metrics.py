"""Loss and accuracy, shared out over the ranks and summed exactly.

Shapes: C classes, K clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data.batching import Samples
from ..distributed import collectives

_BATCH = 1024


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and the share of right answers, 0 to 1, over all samples."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class OverClients:
    """The clients' own models: mean and sample deviation of each client's figures."""

    clients: int
    """How many were judged."""
    not_finite: Sequence[int]
    """Those whose loss is not a finite number."""

    test: Evaluation
    """On the global test set, the mean over the clients."""
    test_spread: float
    """Deviation of the accuracies on the global test set."""
    own_mix: Evaluation
    """On test samples in each client's own mix of labels (and shift of inputs)."""
    own_mix_spread: float


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples) -> Evaluation:
    """Judge ``model`` on the union of all ranks' ``samples`` (some ranks may have none)."""
    loss, right, count = collectives.values_of_sum(table(model, samples, 1).sum(0))
    return Evaluation(loss / count, right / count)


@torch.no_grad()
def table(model: nn.Module, samples: Samples, classes: int) -> Tensor:
    """Sum of losses, right answers and samples of each class, (C, 3) in float64.

    With one class there is a single row for all samples.
    """
    model.eval()
    totals_C3 = torch.zeros(classes, 3, dtype=torch.float64, device=samples.labels.device)
    for start in range(0, len(samples), _BATCH):
        batch = samples[start : start + _BATCH]
        scores = model(batch.inputs)
        losses = cross_entropy(scores.double(), batch.labels, reduction="none")
        right = (scores.argmax(1) == batch.labels).double()
        rows = torch.stack([losses, right, torch.ones_like(losses)], dim=1)
        place = batch.labels if classes > 1 else torch.zeros_like(batch.labels)
        totals_C3.index_add_(0, place, rows)
    return totals_C3


def in_mix(table_C3: Tensor, mix_C: Tensor) -> Tensor:
    """Mean loss and accuracy, (2,), if the classes came in the shares of ``mix_C``.

    A class that the test set lacks is left out.
    """
    count_C = table_C3[:, 2]
    share_C = mix_C.to(table_C3) * (count_C > 0)
    return (table_C3[:, :2] / count_C.clamp_min(1).unsqueeze(1)).T @ (share_C / share_C.sum())


def over_clients(rows: Mapping[int, Tensor], clients: Sequence[int], like: Tensor) -> OverClients:
    """From this rank's rows [loss, accuracy, loss in own mix, accuracy in own mix] by client.

    Each of ``clients`` is judged by one rank; all ranks return the same.
    """
    all_K4 = torch.zeros(len(clients), 4, dtype=torch.float64, device=like.device)
    for place, client in enumerate(clients):
        if client in rows:
            all_K4[place] = rows[client]
    all_K4 = collectives.to_cpu(collectives.sum_over_ranks(all_K4))
    loss, accuracy, own_loss, own_accuracy = all_K4.mean(0).tolist()
    spread = all_K4.std(0).tolist() if len(clients) > 1 else [0.0] * 4
    finite = all_K4.isfinite().all(1).tolist()
    return OverClients(
        clients=len(clients),
        not_finite=[c for c, good in zip(clients, finite, strict=True) if not good],
        test=Evaluation(loss, accuracy),
        test_spread=spread[1],
        own_mix=Evaluation(own_loss, own_accuracy),
        own_mix_spread=spread[3],
    )
