"""Loss and metrics, computed by all ranks together and summed exactly.  Used by ``evaluator``.

Totals are a vector (T,) in float64: the sum of the losses, the number of samples, and the sums of
the task.  They can be added over samples, groups of samples, and ranks.

Shapes: T totals, G groups, C classes, K clients, F figures (the loss and all numbers in metrics).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..data.batching import Samples
from ..distributed import collectives
from ..models.outputs import applied
from ..tasks.objective import Objective


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over all samples, and the task's metrics: numbers, or lists with one per class."""

    loss: float
    metrics: Mapping[str, Any]

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0 to 1; only classification has it."""
        return float(self.metrics["accuracy"])

    def recorded(self, prefix: str) -> dict[str, Any]:
        """Returns the metrics by name after ``prefix``, with None for what is not finite."""
        return {f"{prefix}{name}": _finite(value) for name, value in self.metrics.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return value if math.isfinite(value) else None


Rows = Mapping[int, tuple[Evaluation, Evaluation]]
"""Evaluations of clients by number: on the test set, and on the client's own data."""


@dataclass(frozen=True)
class OverClients:
    """Means and sample standard deviations over the clients' models of their figures."""

    clients: int
    """Number of evaluated clients."""
    not_finite: Sequence[int]
    """Clients whose loss is not finite."""
    test: Evaluation
    """Mean over the clients, on the global test set."""
    test_spread: Evaluation
    own: Evaluation
    """Mean over the clients, each on its own data."""
    own_spread: Evaluation


@dataclass
class Meter:
    """Computes totals of models for an objective, and figures from totals."""

    objective: Objective
    _width: int = field(default=0, init=False)
    """The number of totals T, on which the ranks agree once."""

    @torch.no_grad()
    def totals(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Samples, Tensor | int]],
        groups: int = 1,
        with_metrics: bool = True,
    ) -> Tensor:
        """Returns the totals by group, (G, T); without metrics, or without batches, (G, 2).

        Beside each batch stand the groups of its samples, (N,), or one for all.
        """
        model.eval()
        device = next(model.parameters()).device
        totals_GT = torch.zeros(groups, 2, dtype=torch.float64, device=device)
        for batch, groups_N in batches:
            output = tree_map(_widened, applied(model, batch.inputs))
            targets = _widened(batch.labels)
            losses_N = self.objective.losses(output, targets).double()
            columns = [losses_N.unsqueeze(1), torch.ones_like(losses_N).unsqueeze(1)]
            if with_metrics:
                read = self.objective.read(output)
                columns.append(self.objective.task.sums(read, targets).double())
            rows_NT = torch.cat(columns, dim=1)
            if totals_GT.shape[1] < rows_NT.shape[1]:
                totals_GT = _padded(totals_GT, rows_NT.shape[1])
            if groups == 1:
                totals_GT += rows_NT.sum(0)
            else:
                index = groups_N + torch.zeros(len(batch), dtype=torch.int64, device=device)
                totals_GT.index_add_(0, index, rows_NT)
        return totals_GT

    def summed(self, totals_GT: Tensor) -> Tensor:
        """Returns the sum over all ranks, some of which may have had no batches."""
        if not self._width:
            self._width = max(collectives.all_gather_object(totals_GT.shape[1]))
        return collectives.sum_over_ranks(_padded(totals_GT, self._width))

    def evaluation(self, totals_T: Tensor) -> Evaluation:
        """Returns loss and metrics of totals."""
        loss, samples, *_ = collectives.to_cpu(totals_T).tolist()
        sums = collectives.to_cpu(totals_T[2:])
        metrics = self.objective.metrics(sums, samples) if len(sums) else {}
        return Evaluation(loss / samples, metrics)

    def evaluate(self, model: nn.Module, samples: Iterable[Samples]) -> Evaluation:
        """Evaluates ``model`` on the union of all ranks' ``samples``; some ranks may have none."""
        return self.evaluation(self.summed(self.totals(model, ((s, 0) for s in samples)))[0])

    def loss(self, model: nn.Module, samples: Iterable[Samples]) -> float:
        """Returns the mean loss over the union of all ranks' ``samples``."""
        batches = ((batch, 0) for batch in samples)
        [totals_2] = collectives.sum_over_ranks(self.totals(model, batches, with_metrics=False))
        total, count = collectives.to_cpu(totals_2).tolist()
        return float(total / count)


def evaluate(
    model: nn.Module, samples: Iterable[Samples], objective: Objective | None = None
) -> Evaluation:
    """Evaluates ``model`` on the union of all ranks' ``samples``, by default as a classifier."""
    return Meter(objective or Objective()).evaluate(model, samples)


def in_mix(totals_CT: Tensor, mix_C: Tensor) -> Tensor:
    """Returns totals (T,) of one sample on average, for classes in the shares of ``mix_C``.

    Classes without test samples are left out.
    """
    count_C = totals_CT[:, 1]
    share_C = mix_C.to(totals_CT) * (count_C > 0)
    return (totals_CT / count_C.clamp_min(1).unsqueeze(1)).T @ (share_C / share_C.sum())


def first_number(metrics: Mapping[str, Any]) -> str | None:
    """Returns the name of the first metric that is a number; None if there is none."""
    return next((name for name, value in metrics.items() if isinstance(value, float)), None)


def gathered(rows: Rows) -> Rows:
    """Returns the rows of all ranks, each of which has those of other clients; collective."""
    all_rows = collectives.all_gather_object(rows)
    return {client: row for part in all_rows for client, row in part.items()}


def over_clients(rows: Rows) -> OverClients:
    """Returns means and deviations over the clients of ``rows``."""
    clients, like = sorted(rows), next(iter(rows.values()))
    figures = [[*_figures(test), *_figures(own)] for test, own in (rows[k] for k in clients)]
    figures_KF = torch.tensor(figures, dtype=torch.float64)
    test_KF, own_KF = figures_KF.chunk(2, dim=1)
    losses_K2 = torch.stack([test_KF[:, 0], own_KF[:, 0]], dim=1)
    is_finite = losses_K2.isfinite().all(1).tolist()
    return OverClients(
        clients=len(clients),
        not_finite=[c for c, finite in zip(clients, is_finite, strict=True) if not finite],
        test=_evaluation_like(like[0], _mean(test_KF)),
        test_spread=_evaluation_like(like[0], _spread(test_KF)),
        own=_evaluation_like(like[1], _mean(own_KF)),
        own_spread=_evaluation_like(like[1], _spread(own_KF)),
    )


def _mean(figures_KF: Tensor) -> list[float]:
    """Returns means over the clients with a finite figure; those of losses over all clients."""
    means = figures_KF.where(figures_KF.isfinite(), torch.nan).nanmean(0)
    means[0] = figures_KF[:, 0].mean()
    return [float(value) for value in means]


def _spread(figures_KF: Tensor) -> list[float]:
    deviations = []
    for values_K in figures_KF.T:
        known = values_K[values_K.isfinite()]
        deviations.append(float(known.std()) if len(known) > 1 else 0.0)
    return deviations


def _figures(evaluation: Evaluation) -> list[float]:
    figures = [evaluation.loss]
    for value in evaluation.metrics.values():
        figures += value if isinstance(value, list) else [value]
    return figures


def _evaluation_like(like: Evaluation, figures: Sequence[float]) -> Evaluation:
    """Returns an evaluation with the metrics of ``like`` and these numbers."""
    loss, *rest = figures
    metrics: dict[str, Any] = {}
    for name, value in like.metrics.items():
        if isinstance(value, list):
            metrics[name], rest = rest[: len(value)], rest[len(value) :]
        else:
            metrics[name], *rest = rest
    return Evaluation(loss, metrics)


def _widened(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def _padded(totals_GT: Tensor, width: int) -> Tensor:
    more = totals_GT.new_zeros(len(totals_GT), width - totals_GT.shape[1])
    return torch.cat([totals_GT, more], dim=1)
