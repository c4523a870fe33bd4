"""Loss and accuracy, computed by all ranks together and summed exactly.  Used by ``evaluator``.

Shapes: C classes, K clients.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data.batching import Samples
from ..distributed import collectives
from ..models.outputs import PLAIN_READER, OutputReader, applied


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and the share of right answers, 0 to 1, over all samples."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class OverClients:
    """Mean and sample standard deviation over the clients' models of their figures."""

    clients: int
    """Number of evaluated clients."""
    not_finite: Sequence[int]
    """Clients whose loss is not finite."""

    test: Evaluation
    """Mean over the clients, on the global test set."""
    test_spread: float
    """Deviation of the accuracy on the global test set."""
    own_mix: Evaluation
    """Mean over the clients, each on test samples in its label mix (and shift of inputs)."""
    own_mix_spread: float
    """Deviation of the accuracy in the client's label mix."""


@dataclass(frozen=True)
class OwnAccuracies:
    """Mean and sample deviation over clients of one model's accuracy on each one's own tests."""

    clients: int
    mean: float
    spread: float


def own_accuracies(totals_K3: Tensor) -> OwnAccuracies:
    """Returns the figures of K clients, from their totals."""
    right_K = collectives.to_cpu(totals_K3[:, 1] / totals_K3[:, 2])
    spread = right_K.std().item() if len(right_K) > 1 else 0.0
    return OwnAccuracies(len(right_K), right_K.mean().item(), spread)


def evaluate(
    model: nn.Module, samples: Iterable[Samples], outputs: OutputReader = PLAIN_READER
) -> Evaluation:
    """Evaluates ``model`` on the union of all ranks' ``samples``; some ranks may have none."""
    loss, right, count = collectives.sum_as_list(class_totals(model, samples, 1, outputs).sum(0))
    return Evaluation(loss / count, right / count)


def class_totals(
    model: nn.Module, samples: Iterable[Samples], classes: int, outputs: OutputReader
) -> Tensor:
    """Returns sum of losses, right answers and number of samples by class, (C, 3) in float64.

    With ``classes`` = 1 a single row has the totals of all samples.
    """
    return totals(model, ((b, b.labels if classes > 1 else 0) for b in samples), classes, outputs)


@torch.no_grad()
def totals(
    model: nn.Module,
    batches: Iterable[tuple[Samples, Tensor | int]],
    groups: int,
    outputs: OutputReader,
) -> Tensor:
    """Returns sum of losses, right answers and number of samples by group, (groups, 3) in float64.

    Beside each batch stand the groups of its samples, (N,), or one for all.
    """
    model.eval()
    device = next(model.parameters()).device
    totals_G3 = torch.zeros(groups, 3, dtype=torch.float64, device=device)
    for batch, groups_N in batches:
        scores = outputs.scores(applied(model, batch.inputs))
        losses = cross_entropy(scores.double(), batch.labels, reduction="none")
        right = (scores.argmax(1) == batch.labels).double()
        rows = torch.stack([losses, right, torch.ones_like(losses)], dim=1)
        index = torch.zeros_like(batch.labels) + groups_N
        totals_G3.index_add_(0, index, rows)
    return totals_G3


def in_mix(totals_C3: Tensor, mix_C: Tensor) -> Tensor:
    """Returns mean loss and accuracy, (2,), for classes in the shares of ``mix_C``.

    Classes without test samples are left out.
    """
    count_C = totals_C3[:, 2]
    share_C = mix_C.to(totals_C3) * (count_C > 0)
    return (totals_C3[:, :2] / count_C.clamp_min(1).unsqueeze(1)).T @ (share_C / share_C.sum())


def over_clients(
    rows: Mapping[int, Tensor], clients: Sequence[int], device: torch.device
) -> OverClients:
    """Gathers the figures of ``clients``, each evaluated by one rank; all ranks return the same.

    ``rows`` are this rank's, by client: test loss, test accuracy, and both in the client's label
    mix.  The collective is on ``device``.
    """
    figures_K4 = torch.zeros(len(clients), 4, dtype=torch.float64, device=device)
    for index, client in enumerate(clients):
        if client in rows:
            figures_K4[index] = rows[client]
    figures_K4 = collectives.to_cpu(collectives.sum_over_ranks(figures_K4))
    loss, accuracy, mix_loss, mix_accuracy = figures_K4.mean(0).tolist()
    spread = figures_K4.std(0).tolist() if len(clients) > 1 else [0.0] * 4
    finite = figures_K4.isfinite().all(1).tolist()
    return OverClients(
        clients=len(clients),
        not_finite=[c for c, is_finite in zip(clients, finite, strict=True) if not is_finite],
        test=Evaluation(loss, accuracy),
        test_spread=spread[1],
        own_mix=Evaluation(mix_loss, mix_accuracy),
        own_mix_spread=spread[3],
    )
