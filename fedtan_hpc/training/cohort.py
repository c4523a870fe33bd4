"""The clients that a rank hosts in a round: their local steps, and their part of the average.

Steps with global statistics need all clients of the rank together.  On a CPU they run in lock-step
threads, each on a replica of the model, or stacked where batches are so small that changing from
thread to thread would take longer; all other steps are taken one client after another, which is
faster there than stacking them.  On a GPU all are stacked, if the network can be.  One client on a
rank runs by itself, and a rank without a client takes part in the synchronised steps with one
sample and the weight 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..batchnorm.context import federated_backward
from ..config.algorithms import Normaliser, ParameterGroup, RoundPlan
from ..config.enums import CohortMode
from ..config.schema import CohortConfig
from ..data.batching import Samples
from ..data.client_store import Client
from ..distributed.model_average import ModelSum, model_tensors, named_tensors
from ..models.parameter_groups import TensorFilter, groups_of
from ..runtime.transfer import copy_all
from .client_state import PrivateStates
from .local_training import LocalRun, LocalTraining, RoundContext, set_training_mode
from .memory_budget import MemoryBudget
from .pooled_gradients import Momentum, pool_gradients
from .server_optimizer import Server
from .vmap_clients import Stack

_SMALL = 4_000_000
"""Bytes that a client's pass keeps: below it the mlp, the cnn on 16x16 and ResNet-20 on 8x8 images
ran 1.1 to 2.6 times faster stacked than in lock-step (2 cores); from 9 MB on there was no gain."""

Way = Callable[[Sequence[Client], RoundContext, ModelSum], list[Tensor]]


class Stacking(Enum):
    """What is known of a model's clients as a stack."""

    fails = auto()
    works = auto()
    """On a GPU that is reason enough."""
    pays = auto()
    """Also on a CPU, while batches are small."""


class Cohort:
    """Trains a rank's clients from the global model and makes the next global model."""

    def __init__(
        self,
        model: nn.Module,
        training: LocalTraining,
        dummy: Samples,
        config: CohortConfig,
        budget: MemoryBudget,
        states: PrivateStates,
        server: Server,
        stacking: Stacking = Stacking.works,
        compiles_synchronised: bool = False,
    ) -> None:
        self.model = model
        """The global model between rounds; also the first client's in a round.

        Between rounds its private parts are those of a client that has never been drawn.
        """
        self.states = states
        self._config = config
        self._budget = budget
        self.training = training
        self._server = server
        self._stacking = stacking
        self._compiles_synchronised = compiles_synchronised
        """Whether every rank has one client in every round, with a whole batch."""
        self._stand_in = Client(0, 0.0, dummy)
        self._momentum = Momentum()
        self._parts = groups_of(model)
        self._replicas: list[nn.Module] = [model]

    def memory(self) -> dict[str, Any]:
        """Copies on the CPU of all that outlives a round, the clients' own states apart."""
        named = named_tensors(self.model)
        return {
            "model": dict(zip(named, _copies(list(named.values())), strict=True)),
            "server": _copies(self._server.memory()),
            "momentum": _copies(self._momentum.memory()),
        }

    @torch.no_grad()
    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what ``memory`` gave in another run of the same configuration."""
        device = next(self.model.parameters()).device
        for name, value in named_tensors(self.model).items():
            value.copy_(memory["model"][name])
        self._server.recall([value.to(device) for value in memory["server"]])
        self._momentum.recall([value.to(device) for value in memory["momentum"]])

    def train(self, clients: Sequence[Client], now: RoundContext) -> list[Tensor]:
        """One round of ``clients`` (none to many); their mean losses, 0-d float64 each.

        Afterwards ``model`` is the new global model, the same on all ranks.
        """
        total = ModelSum(
            self.model, counters=True, select=TensorFilter(self.model, now.plan.averaged)
        )
        fixed = self._neither_averaged_nor_private(now.plan)
        self._server.begin(self.model)
        run_all = self._way(len(clients), now.plan)
        with self._budget.spent_on(*self._needs(run_all, len(clients), now.plan), now.number):
            losses = run_all(clients, now, total)
        total.over_ranks()
        self.states.reset(self.model)
        for tensor, value in fixed:
            tensor.copy_(value)
        total.copy_to(self.model)
        self._server.step(self.model)
        return losses

    def _neither_averaged_nor_private(self, plan: RoundPlan) -> list[tuple[Tensor, Tensor]]:
        """Buffers of the global model, and copies, that its first client may not change for all."""
        return [
            (value, value.clone())
            for name, value in self.model.named_buffers()
            if self._parts[name] not in self.states.parts
            and not self._is_averaged(name, value, plan)
        ]

    def _is_averaged(self, name: str, value: Tensor, plan: RoundPlan) -> bool:
        if name.endswith("num_batches_tracked"):
            return ParameterGroup.statistics in plan.averaged
        part = self._parts[name]
        return part in plan.averaged and (value.is_floating_point() or value.is_complex())

    def _way(self, clients: int, plan: RoundPlan) -> Way:
        """How so many clients run on this device."""
        synchronised = plan.synchronised_steps > 0
        together = self._stacks_all or (synchronised and self._stacks_synchronised)
        if clients > 1 and together and plan.normaliser is not Normaliser.running:
            return self._stacked
        if clients > 1 and not synchronised:
            return self._one_after_another
        return self._side_by_side

    @property
    def _on_gpu(self) -> bool:
        return next(self.model.parameters()).is_cuda

    @property
    def _stacks_all(self) -> bool:
        """Whether all steps are stacked."""
        chosen = self._config.mode is CohortMode.auto
        on_gpu = self._on_gpu and self._stacking is not Stacking.fails
        return self._config.mode is CohortMode.stacked or (chosen and on_gpu)

    @property
    def _stacks_synchronised(self) -> bool:
        """Whether at least those with global statistics are."""
        if self._on_gpu:
            return self._stacking is not Stacking.fails
        pays = self._stacking is Stacking.pays and self._budget.bytes_at_once < _SMALL
        return self._config.mode is CohortMode.auto and pays

    def _needs(self, way: Way, clients: int, plan: RoundPlan) -> tuple[int, int]:
        """Clients whose parameters, and whose activations, are in memory together."""
        if plan.synchronised_steps > 0:
            return clients, clients
        if way == self._stacked:
            return clients, min(clients, self._config.max_stacked)
        return min(clients, 1), min(clients, 1)

    def _stacked(
        self, clients: Sequence[Client], now: RoundContext, total: ModelSum
    ) -> list[Tensor]:
        """All clients at once, or only as long as statistics are global."""
        [_, replica] = self._replicas_for(2)
        set_training_mode(self.model, now.plan)
        stack = Stack(self.model, [self._start(replica, client, now) for client in clients])
        for client_index, client in enumerate(clients):
            if self.states.exist:
                self.states.load(client.number, replica)
                stack.enter(client_index, replica)
        for _ in range(now.plan.synchronised_steps):
            stack.synchronised_step(now.plan.pooled_gradients)
        if self._stacks_all:
            for _ in range(self.training.local_steps - now.plan.synchronised_steps):
                stack.local_step(self._config.max_stacked)
        losses = []
        for client_index in range(len(clients)):
            copy_all(model_tensors(replica), model_tensors(self.model))
            losses.append(self._finish(stack.leave(client_index), now, total))
        return losses

    def _side_by_side(
        self, clients: Sequence[Client], now: RoundContext, total: ModelSum
    ) -> list[Tensor]:
        """Each client on a replica of its own, in lock-step while statistics are global."""
        models = self._replicas_for(max(1, len(clients)))
        for model, client in zip(models, clients, strict=False):
            self.states.load(client.number, model)
        hosted = clients or [self._stand_in]
        runs = [
            self._start(model, client, now) for model, client in zip(models, hosted, strict=True)
        ]
        for _ in range(now.plan.synchronised_steps):
            self._synchronised_step(runs, now.plan.pooled_gradients)
        if not clients:
            self._momentum.keep_of(runs[0], now.plan)
            return []
        return [self._finish(run, now, total) for run in runs]

    def _synchronised_step(self, runs: Sequence[LocalRun], pooled: bool) -> None:
        """Of all clients together; a stand-in's steps count for nothing unless all are the same."""
        models, weights = [run.model for run in runs], [run.client.weight for run in runs]
        losses = [partial(run.loss, eager=not self._compiles_synchronised) for run in runs]
        if runs[0].client is self._stand_in:
            models[0].zero_grad()
            losses = [partial(self.training.loss, models[0], self._stand_in.samples, eager=True)]
        values = federated_backward(models, losses, weights)
        if pooled:
            pool_gradients(models, weights)
        elif runs[0].client is self._stand_in:
            models[0].zero_grad()
            return
        for run, value in zip(runs, values, strict=True):
            run.step(value)

    def _one_after_another(
        self, clients: Sequence[Client], now: RoundContext, total: ModelSum
    ) -> list[Tensor]:
        """All clients on one replica, each from the global model."""
        [_, replica] = self._replicas_for(2)
        losses = []
        for client in clients:
            copy_all(model_tensors(replica), model_tensors(self.model))
            self.states.load(client.number, replica)
            losses.append(self._finish(self._start(replica, client, now), now, total))
        return losses

    def _start(self, model: nn.Module, client: Client, now: RoundContext) -> LocalRun:
        run = self.training.start(model, client, now)
        self._momentum.give_to(run, now.plan)
        return run

    def _finish(self, run: LocalRun, now: RoundContext, total: ModelSum) -> Tensor:
        """The client's steps that are left, its part of the average and its private state."""
        self._momentum.keep_of(run, now.plan)
        loss = run.finish()
        total.add(run.model, run.client.weight)
        self.states.save(run.client.number, run.model)
        return loss

    def _replicas_for(self, clients: int) -> list[nn.Module]:
        """The model and copies of it, as many as ``clients``, all with the global values."""
        while len(self._replicas) < clients:
            self._replicas.append(copy.deepcopy(self.model))
        del self._replicas[clients:]
        for replica in self._replicas[1:]:
            copy_all(model_tensors(replica), model_tensors(self.model))
        return list(self._replicas)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]
