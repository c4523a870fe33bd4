"""Large-batch SGD on the pooled data: every step follows the mean gradient of all clients.

All clients then hold the same model after each step, and momentum is that of one optimizer: it
goes on from round to round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config.algorithms import RoundPlan
from ..distributed import collectives
from ..models.parameter_groups import pack, unpack
from .local_training import LocalRun


@torch.no_grad()
def pool_gradients(models: Sequence[nn.Module], weights: Sequence[float]) -> None:
    """Set the gradients of all ``models`` to sum_k p_k g_k over all clients of all ranks.

    One collective.  A client of weight 0 adds nothing, whatever its gradients.
    """
    own = []
    trained = [[v for v in model.parameters() if v.requires_grad] for model in models]
    for values in zip(*trained, strict=True):
        mean = torch.zeros_like(values[0])
        for value, weight in zip(values, weights, strict=True):
            if weight and value.grad is not None:
                mean.add_(value.grad, alpha=weight)
        own.append(mean)
    mean_over_ranks(own)
    for parameters in trained:
        for value, mean in zip(parameters, own, strict=True):
            value.grad = mean.clone()


def mean_over_ranks(sums: list[Tensor]) -> None:
    """Add up the ranks' weighted sums, in place, as one message."""
    unpack(collectives.sum_for_training(pack(sums), of_models=True), sums)


class Momentum:
    """The optimizer's memory between rounds of pooled gradients; empty in all other rounds."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def memory(self) -> list[Tensor]:
        """What a later round needs to know of those before."""
        return self._buffers

    def recall(self, memory: list[Tensor]) -> None:
        """Go on from the ``memory`` of another run's."""
        self._buffers = memory

    def give_to(self, run: LocalRun, plan: RoundPlan) -> None:
        """Let the optimizer of ``run`` go on from where the last round ended."""
        if plan.pooled_gradients:
            for value, buffer in zip(_trained(run), self._buffers, strict=False):
                run.optimizer.state[value]["momentum_buffer"] = buffer.clone()

    def keep_of(self, run: LocalRun, plan: RoundPlan) -> None:
        """Keep what the optimizer of ``run`` holds; it is the same for all clients."""
        if plan.pooled_gradients:
            states = [run.optimizer.state[value] for value in _trained(run)]
            buffers = [state.get("momentum_buffer") for state in states]
            self._buffers = [buffer.clone() for buffer in buffers if buffer is not None]


def _trained(run: LocalRun) -> list[nn.Parameter]:
    return [value for value in run.model.parameters() if value.requires_grad]
