"""The clients that a rank hosts in a round: their local steps, and their part of the average.

Steps with global statistics need all clients of the rank together.  On a CPU they run in lock-step
threads, each on a replica of the model, and all other steps one client after another; that is
faster there than stacking them.  On a GPU they are stacked.  One client on a rank runs by itself,
and a rank without a client takes part in the synchronised steps with one sample and the weight 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .average import ModelSum, model_tensors
from .batchnorm import federated_backward
from .clients import Client
from .config import CohortConfig, CohortMode
from .data import Samples
from .local_training import LocalRun, LocalTraining, loss_of
from .memory import Budget
from .stacked import Stack


class Cohort:
    """Trains a rank's clients from the global model and makes the next global model."""

    def __init__(
        self,
        model: nn.Module,
        training: LocalTraining,
        dummy: Samples,
        config: CohortConfig,
        ranks_here: int = 1,
    ) -> None:
        self.model = model
        """The global model between rounds; also the first client's in a round."""
        self._config = config
        self._budget = Budget(model, dummy, training, ranks_here)
        self._training = training
        self._dummy = dummy
        self._replicas: list[nn.Module] = [model]

    def train(
        self, clients: Sequence[Client], round_number: int, learning_rate: float
    ) -> list[Tensor]:
        """One round of ``clients`` (none to many); their mean losses, 0-d float64 each.

        Afterwards ``model`` is the new global model, the same on all ranks.
        """
        total = ModelSum(self.model, counters=True)
        run_all = self._way(len(clients))
        with self._budget.spent_on(*self._needs(run_all, len(clients)), round_number):
            losses = run_all(clients, round_number, learning_rate, total)
        total.over_ranks()
        total.copy_to(self.model)
        return losses

    def _way(self, clients: int) -> Callable[..., list[Tensor]]:
        """How so many clients run on this device."""
        on_gpu = next(self.model.parameters()).is_cuda
        synchronised = self._training.algorithm.synchronised_steps > 0
        stacked = {"auto": on_gpu, "stacked": True, "sequential": on_gpu and synchronised}
        if clients > 1 and stacked[self._config.mode]:
            return self._stacked
        if clients > 1 and not synchronised:
            return self._one_after_another
        return self._side_by_side

    def _needs(self, way: Callable[..., list[Tensor]], clients: int) -> tuple[int, int]:
        """Clients whose parameters, and whose activations, are in memory together."""
        if self._training.algorithm.synchronised_steps > 0:
            return clients, clients
        if way == self._stacked:
            return clients, min(clients, self._config.max_stacked)
        return min(clients, 1), min(clients, 1)

    def _stacked(
        self, clients: Sequence[Client], number: int, rate: float, total: ModelSum
    ) -> list[Tensor]:
        """All clients at once; in sequential mode only as long as statistics are global."""
        [_, replica] = self._replicas_for(2)
        self.model.train()
        runs = [self._training.start(replica, client, number, rate) for client in clients]
        stack = Stack(self.model, runs)
        synchronised = self._training.algorithm.synchronised_steps
        for _ in range(synchronised):
            stack.synchronised_step()
        if self._config.mode is not CohortMode.sequential:
            for _ in range(self._training.local_steps - synchronised):
                stack.local_step(self._config.max_stacked)
        losses = []
        for lane, client in enumerate(clients):
            _copy(self.model, replica)
            losses.append(stack.leave(lane).finish())
            total.add(replica, client.weight)
        return losses

    def _side_by_side(
        self, clients: Sequence[Client], number: int, rate: float, total: ModelSum
    ) -> list[Tensor]:
        """Each client on a replica of its own, in lock-step while statistics are global."""
        models = self._replicas_for(max(1, len(clients)))
        runs = [
            self._training.start(model, client, number, rate)
            for model, client in zip(models, clients, strict=False)
        ]
        for _ in range(self._training.algorithm.synchronised_steps):
            self._synchronised_step(models, runs)
        losses = []
        for run in runs:
            losses.append(run.finish())
            total.add(run.model, run.client.weight)
        return losses

    def _synchronised_step(self, models: Sequence[nn.Module], runs: Sequence[LocalRun]) -> None:
        if not runs:
            models[0].train()
            federated_backward(models, [partial(loss_of, models[0], self._dummy)], [0.0])
            models[0].zero_grad()
            return
        weights = [run.client.weight for run in runs]
        losses = federated_backward(models, [run.loss for run in runs], weights)
        for run, loss in zip(runs, losses, strict=True):
            run.step(loss)

    def _one_after_another(
        self, clients: Sequence[Client], number: int, rate: float, total: ModelSum
    ) -> list[Tensor]:
        """All clients on one replica, each from the global model."""
        [_, replica] = self._replicas_for(2)
        losses = []
        for client in clients:
            _copy(self.model, replica)
            losses.append(self._training.start(replica, client, number, rate).finish())
            total.add(replica, client.weight)
        return losses

    def _replicas_for(self, clients: int) -> list[nn.Module]:
        """The model and copies of it, as many as ``clients``, all with the global values."""
        while len(self._replicas) < clients:
            self._replicas.append(copy.deepcopy(self.model))
        del self._replicas[clients:]
        for replica in self._replicas[1:]:
            _copy(self.model, replica)
        return list(self._replicas)


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    for value, of_source in zip(model_tensors(target), model_tensors(source), strict=True):
        value.copy_(of_source)
