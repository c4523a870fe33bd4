"""Large batches of the pooled data: every step follows the mean gradient of all clients.

All clients hold the same model after each step.  The optimizer's state is that of one optimizer,
and it continues from round to round.  Used by ``client_runners`` and ``stacked``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config.algorithms import RoundPlan
from ..distributed import collectives
from ..models.parameter_groups import pack, unpack
from .local_step import LocalRun
from .optimizers import State, trained_parameters


@torch.no_grad()
def pool_gradients(models: Sequence[nn.Module], weights: Sequence[float]) -> None:
    """Sets the gradients of all ``models`` to sum_k p_k g_k over all clients of all ranks.

    One collective.  A client with weight 0 adds nothing, whatever its gradients are.
    """
    trained = [list(trained_parameters(model).values()) for model in models]
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


class PooledState:
    """The optimizer's state between rounds with pooled gradients; empty in other rounds."""

    def __init__(self) -> None:
        self._state: State = {}

    def state_dict(self) -> State:
        """Returns the state by name of a trained parameter; empty if there is none."""
        return self._state

    def load_state_dict(self, state: State) -> None:
        """Loads what ``state_dict`` returned."""
        self._state = state

    def give_to(self, run: LocalRun, plan: RoundPlan) -> None:
        """Gives the optimizer of ``run`` the state at the end of the last round."""
        if plan.pooled_gradients:
            run.optimizer.load(self._state)

    def keep_of(self, run: LocalRun, plan: RoundPlan) -> None:
        """Keeps the state of ``run``, which is equal for all clients."""
        if plan.pooled_gradients:
            self._state = {
                name: {key: tensor.clone() for key, tensor in tensors.items()}
                for name, tensors in run.optimizer.state().items()
            }
