"""How a rank runs its clients in a round: in lock-step, stacked, or one after another.

``job.setup`` makes the runners once; the round loop calls ``ClientRunners.run``.  The steps
themselves are in ``local_step`` (one client) and ``stacked`` (a stack).
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..batchnorm.context import federated_backward
from ..config.algorithms import ALGORITHMS, Normaliser, RoundPlan
from ..config.enums import CohortMode, ModelSource
from ..config.errors import one_line
from ..config.schema import Config
from ..data.batching import Samples
from ..data.client_store import Client
from ..distributed import counters, process_group
from ..distributed.model_average import ModelSum, model_tensors
from ..models.copies import copied
from ..runtime.transfer import copy_all
from .client_ranks import ALONE, ClientRanks
from .client_state import PrivateStates
from .local_step import LocalRun, Loss, RoundContext, set_training_mode
from .memory_budget import MemoryBudget
from .pooled_gradients import PooledState, pool_gradients
from .stacked.vmap_clients import Stack
from .stacked.vmap_trial import vmap_error

_SMALL_PASS = 4_000_000
"""Bytes that a client's pass keeps.  Below, the mlp, the cnn on 16x16 images and ResNet-20 on 8x8
images ran 1.1 to 2.6 times faster stacked than in lock-step (2 cores); from 9 MB on, no faster."""

Clients = Sequence[Client]


@dataclass
class ClientModels:
    """The models that clients train in, and the begin and the end of a client's round.

    ``model`` is the global model; in lock-step the first client trains in it.
    """

    model: nn.Module
    config: Config
    loss: Loss
    states: PrivateStates
    ranks: ClientRanks = ALONE
    """The ranks that hold a client together with this one."""
    pooled: PooledState = field(default_factory=PooledState)
    _copies: list[nn.Module] = field(default_factory=list, init=False)

    def replicas(self, count: int) -> list[nn.Module]:
        """Returns ``model`` and copies of it, ``count`` in all, with the global values."""
        while len(self._copies) < count - 1:
            self._copies.append(copied(self.model))
        del self._copies[count - 1 :]
        for replica in self._copies:
            self.reset(replica)
        return [self.model, *self._copies]

    def reset(self, replica: nn.Module) -> None:
        """Gives ``replica`` the global values."""
        copy_all(model_tensors(replica), model_tensors(self.model))

    def start(self, replica: nn.Module, client: Client, context: RoundContext) -> LocalRun:
        """Prepares the steps of ``client`` in ``replica``, from the values that it has."""
        run = LocalRun(replica, client, context, self.config, self.loss, self.ranks)
        self.pooled.give_to(run, context.plan)
        return run

    def finish(self, run: LocalRun, context: RoundContext, model_sum: ModelSum) -> Tensor:
        """Takes the run's remaining local steps; returns the mean loss of all, 0-d float64.

        Adds the model to ``model_sum`` and keeps the client's private state.
        """
        self.pooled.keep_of(run, context.plan)
        counters.progress.client = run.client.number  # stays after an error, to name the client
        loss = run.finish()
        counters.progress.client = None
        if self.ranks.is_first:  # the others have an equal model
            model_sum.add(run.model, run.client.weight)
            self.states.save(run.client.number, run.model)
        return loss


@dataclass
class ClientRunner(ABC):
    """Runs the clients of a round, each from the global model and its private state."""

    models: ClientModels

    @abstractmethod
    def run(self, clients: Clients, context: RoundContext, model_sum: ModelSum) -> list[Tensor]:
        """Adds the clients' models to ``model_sum``; returns their mean losses, 0-d float64."""


@dataclass
class LockstepRunner(ClientRunner):
    """Each client trains a replica; the clients' synchronised steps run in lock-step threads.

    Also runs one client, or none: then one sample with weight 0 takes part in synchronised steps.
    """

    dummy: Samples
    """One sample, which takes part where this rank has no client."""
    compiles_synchronised: bool
    """Whether compiled and eager ranks never meet: each has one client with whole batches."""

    def run(self, clients: Clients, context: RoundContext, model_sum: ModelSum) -> list[Tensor]:
        """Takes the synchronised steps of all clients, then the local steps of each."""
        models, plan = self.models, context.plan
        replicas = models.replicas(max(1, len(clients)))
        for replica, client in zip(replicas, clients, strict=False):
            models.states.load(client.number, replica)
        pairs = zip(replicas, clients or [Client(0, 0.0, self.dummy)], strict=True)
        runs = [models.start(replica, client, context) for replica, client in pairs]
        for _ in range(plan.synchronised_steps):
            self._synchronised_step(runs, plan)
        if not clients:
            models.pooled.keep_of(runs[0], plan)
            return []
        return [models.finish(run, context, model_sum) for run in runs]

    def _synchronised_step(self, runs: Sequence[LocalRun], plan: RoundPlan) -> None:
        """Takes one step of all clients; the dummy moves only with pooled gradients."""
        replicas = [run.model for run in runs]
        weights = [run.client.weight * run.share for run in runs]
        losses = [partial(run.loss, eager=not self.compiles_synchronised) for run in runs]
        is_dummy = runs[0].client.samples is self.dummy
        if is_dummy:
            replicas[0].zero_grad()
            sample = self.dummy
            if plan.layers is not None:  # a layer with local statistics needs two values
                sample = sample[torch.zeros(2, dtype=torch.int64, device=sample.device)]
            losses = [partial(self.models.loss, replicas[0], sample, eager=True)]
        with ExitStack() as local:
            for run in runs:
                local.enter_context(run.statistics())
            values = federated_backward(replicas, losses, weights, layers=plan.layers)
        if plan.pooled_gradients:
            pool_gradients(replicas, weights)
        elif is_dummy:
            replicas[0].zero_grad()
            return
        for run, value in zip(runs, values, strict=True):
            run.step(value, are_averaged=plan.pooled_gradients)


@dataclass
class StackedRunner(ClientRunner):
    """All clients train as one stack: in synchronised steps only, or while all have steps."""

    all_steps: bool
    max_stacked: int
    """Most clients in one pass of a local step."""

    def run(self, clients: Clients, context: RoundContext, model_sum: ModelSum) -> list[Tensor]:
        """Takes the stacked steps, then the other steps of one client after another."""
        models, plan = self.models, context.plan
        [model, replica] = models.replicas(2)
        set_training_mode(model, plan)
        runs = [models.start(replica, client, context) for client in clients]
        stack = Stack(model, runs)
        if models.states.exist:
            for client_index, client in enumerate(clients):
                models.states.load(client.number, replica)
                stack.load_client(client_index, replica)
        for _ in range(plan.synchronised_steps):
            stack.synchronised_step(plan.pooled_gradients, plan.layers)
        if self.all_steps:
            for _ in range(min(run.steps for run in runs) - plan.synchronised_steps):
                stack.local_step(self.max_stacked)
        losses = []
        for client_index in range(len(clients)):
            models.reset(replica)
            run = stack.extract_client(client_index)
            losses.append(models.finish(run, context, model_sum))
        return losses


class SequentialRunner(ClientRunner):
    """One client after another trains the same replica, in rounds without synchronised steps."""

    def run(self, clients: Clients, context: RoundContext, model_sum: ModelSum) -> list[Tensor]:
        """Takes all steps of a client before those of the next one."""
        models, losses = self.models, []
        [_, replica] = models.replicas(2)
        for client in clients:
            models.reset(replica)
            models.states.load(client.number, replica)
            run = models.start(replica, client, context)
            losses.append(models.finish(run, context, model_sum))
        return losses


@dataclass
class ClientRunners(ClientRunner):
    """Runs each round by the runner that fits the rank's number of clients and the round's plan.

    A stack is the fastest on a GPU.  On a CPU it is the fastest only in synchronised steps with
    small batches, where changing threads costs more than the arithmetic.
    """

    lockstep: LockstepRunner
    stacked: StackedRunner | None
    budget: MemoryBudget

    def __post_init__(self) -> None:
        self._sequential = SequentialRunner(self.models)

    def run(self, clients: Clients, context: RoundContext, model_sum: ModelSum) -> list[Tensor]:
        """Runs none to many clients; raises ``RunError`` if they do not fit in memory."""
        count, plan = len(clients), context.plan
        runner, passes = self.choose(count, plan), count
        if runner is self._sequential:
            count = passes = 1
        elif runner is self.stacked and not plan.synchronised_steps:
            passes = min(count, runner.max_stacked)
        with self.budget.spent_on(count, passes, context.number):
            return runner.run(clients, context, model_sum)

    def steps_together(self, steps: Sequence[int], plan: RoundPlan) -> int:
        """Returns the first steps that the clients take together, before any takes the next one.

        ``steps`` are those of each client of this rank.
        """
        is_stacked = self.stacked is not None and self.choose(len(steps), plan) is self.stacked
        if is_stacked and self.stacked is not None and self.stacked.all_steps:
            return min(steps)
        return plan.synchronised_steps

    def choose(self, clients: int, plan: RoundPlan) -> ClientRunner:
        """Returns the runner of a round with this number of clients on this rank."""
        if clients <= 1:
            return self.lockstep
        can_stack = plan.normaliser is not Normaliser.running  # FBN and HBN cannot
        if can_stack and self.stacked and (plan.synchronised_steps or self.stacked.all_steps):
            return self.stacked
        return self.lockstep if plan.synchronised_steps else self._sequential


def make_runners(
    models: ClientModels, dummy: Samples, budget: MemoryBudget, one_client_per_rank: bool
) -> ClientRunners:
    """Decides how clients run: from ``cohort.mode``, the device, the network and its size.

    ``dummy`` is a single sample.  ``one_client_per_rank``: every rank has one client, with whole
    batches, in every round.  Built-in networks can be stacked; others are tried out, on a GPU only.
    """
    config = models.config
    mode, is_builtin = config.cohort.mode, config.model.source is ModelSource.builtin
    if is_on_gpu(models.model):
        all_steps = mode is not CohortMode.sequential
        stacks = is_builtin or mode is CohortMode.stacked or _can_stack(models, dummy)
    else:
        all_steps = mode is CohortMode.stacked
        is_faster = is_builtin and budget.pass_bytes < _SMALL_PASS
        stacks = all_steps or (is_faster and mode is CohortMode.auto)
    stacks = stacks and not models.ranks.are_many
    stacked = StackedRunner(models, all_steps, config.cohort.max_stacked) if stacks else None
    lockstep = LockstepRunner(models, dummy, one_client_per_rank)
    return ClientRunners(models, lockstep, stacked, budget)


def needs_copies(config: Config, groups: int) -> bool:
    """Whether a rank of so many groups ever has more models than the global one."""
    are_many = (config.clients_per_round or config.clients) > groups
    return are_many or ALGORITHMS[config.algorithm.name].has_client_models


def _can_stack(models: ClientModels, dummy: Samples) -> bool:
    """Tries a stack; if that fails and ranks have several clients, rank 0 prints the reason."""
    config = models.config
    error = vmap_error(models.model, dummy, config, models.loss)
    groups = process_group.world_size() // config.ranks_per_client
    is_told = process_group.rank() == 0 and needs_copies(config, groups)
    if error and is_told:
        how = "the clients of a rank run in lock-step or one after another"
        line = f"cohort.mode={config.cohort.mode}: {how}, because they cannot be stacked"
        print(f"{line} ({one_line(error)})", file=sys.stderr, flush=True)
    return error is None


def is_on_gpu(model: nn.Module) -> bool:
    """Whether the parameters of ``model`` are on a GPU."""
    return next(model.parameters()).is_cuda
