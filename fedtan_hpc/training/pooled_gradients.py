"""Large-batch SGD on the pooled data: every step follows the mean gradient of all clients.

All clients hold the same model after each step.  The momentum is that of one optimizer, and it
continues from round to round.  Used by ``client_runners`` and ``vmap_clients``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config.algorithms import RoundPlan
from ..distributed import collectives
from ..distributed.model_average import named_tensors
from ..models.parameter_groups import pack, unpack
from .local_step import LocalRun


@torch.no_grad()
def pool_gradients(models: Sequence[nn.Module], weights: Sequence[float]) -> None:
    """Sets the gradients of all ``models`` to sum_k p_k g_k over all clients of all ranks.

    One collective.  A client with weight 0 adds nothing, whatever its gradients are.
    """
    trained = [_trained(model) for model in models]
    means = [torch.zeros_like(value) for value in trained[0]]
    for parameters, weight in zip(trained, weights, strict=True):
        for value, mean in zip(parameters, means, strict=True):
            if weight and value.grad is not None:
                mean.add_(value.grad, alpha=weight)
    mean_over_ranks(means)
    for parameters in trained:
        for value, mean in zip(parameters, means, strict=True):
            value.grad = mean.clone()


def mean_over_ranks(sums: list[Tensor]) -> None:
    """Adds up the weighted sums of all ranks, in place, with one message."""
    unpack(collectives.sum_for_training(pack(sums), of_models=True), sums)


class PooledMomentum:
    """The optimizer's momentum between rounds with pooled gradients; empty in other rounds."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def state_dict(self) -> list[Tensor]:
        """Returns the momentum of each trained parameter, or an empty list."""
        return self._buffers

    def load_state_dict(self, buffers: list[Tensor]) -> None:
        """Loads what ``state_dict`` returned."""
        self._buffers = buffers

    def give_to(self, run: LocalRun, plan: RoundPlan) -> None:
        """Gives the optimizer of ``run`` the momentum at the end of the last round."""
        if plan.pooled_gradients:
            for value, buffer in zip(_trained(run.model), self._buffers, strict=False):
                run.optimizer.state[value]["momentum_buffer"] = buffer.clone()

    def keep_of(self, run: LocalRun, plan: RoundPlan) -> None:
        """Keeps the momentum of ``run``, which is equal for all clients."""
        if plan.pooled_gradients:
            states = [run.optimizer.state[value] for value in _trained(run.model)]
            buffers = [state.get("momentum_buffer") for state in states]
            self._buffers = [buffer.clone() for buffer in buffers if buffer is not None]


def _trained(model: nn.Module) -> list[Tensor]:
    return [value for value in named_tensors(model).values() if value.requires_grad]
