"""Measures, before the clients of a round train, what mismatched BN statistics do to gradients.

The passes run on copies of the global model and on each client's first batch of the round, so that
training is the same with a probe and without.  The gradient of one combination of statistics is
that of training's own first step, which saves a pass.

Shapes: K participants that the record names, L BN layers.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite

import torch
from torch import Tensor, nn

from ..batchnorm.context import backward_with, model_tag, normalised_by
from ..batchnorm.conversion import batchnorm_layers
from ..batchnorm.statistics_call import GlobalStatistics
from ..config.algorithms import RoundPlan
from ..data.batching import Samples
from ..data.client_store import Client
from ..distributed import collective_timer, collectives, counters
from ..distributed.lockstep import Lockstep
from ..evaluation.probe_records import DISTANCES, ProbeRecord
from ..models.parameter_groups import pack, unpack
from ..runtime.global_random import GlobalStates
from ..training.client_runners import ClientModels
from ..training.local_step import GradientSum, LocalRun, RoundContext
from ..training.memory_budget import MemoryBudget
from .deviation import deviations, norms
from .mixed_statistics import CAUSES, GLOBAL, Halves, MixedStatistics

_MOST_CLIENTS = 100
"""Participants whose distances a record has."""


@dataclass
class _Cost:
    seconds: float = 0.0
    messages: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Measured:
    """The passes of a probe on this rank, before the ranks add up what they have found."""

    sums: dict[Halves, GradientSum]
    causes: Sequence[str]
    layers: list[str]
    """BN layers with distances; none if the pass that finds them has not run."""
    clients: list[int]
    distances_LK3: Tensor
    cost: _Cost


@dataclass(frozen=True)
class Probe:
    """Probes rounds; every rank calls it with its own clients."""

    models: ClientModels
    dummy: Samples
    """One sample, which takes part where this rank has no client."""
    budget: MemoryBudget

    def measure(
        self,
        clients: Sequence[Client],
        context: RoundContext,
        participants: Sequence[int],
        causes: Sequence[str] = tuple(CAUSES),
    ) -> Measured:
        """Runs the passes that training's first step does not give, three at most.

        Where that step is global in some layers only, it gives none, and the last of three
        ``causes`` is left out.

        Raises ``RunError`` if the clients of this rank do not fit in memory together.
        """
        passes = _passes(context.plan, causes)
        return self._measured(clients, context, participants, passes, causes)

    def finish(self, measured: Measured, context: RoundContext) -> ProbeRecord:
        """Adds up what all ranks have found, in one message; returns the same on every rank."""
        assert context.first_gradients is not None
        return self._record(measured, context, context.first_gradients)

    def alone(
        self, clients: Sequence[Client], context: RoundContext, participants: Sequence[int]
    ) -> ProbeRecord:
        """Measures a round that nobody trains: all four passes, and no cause "trained".

        Returns the same on every rank; raises as ``measure``.
        """
        passes, causes = [GLOBAL, *CAUSES.values()], tuple(CAUSES)
        measured = self._measured(clients, context, participants, passes, causes)
        return self._record(measured, context, None)

    def _measured(
        self,
        clients: Sequence[Client],
        context: RoundContext,
        participants: Sequence[int],
        passes: Sequence[Halves],
        causes: Sequence[str],
    ) -> Measured:
        cost, count = _Cost(), max(1, len(clients))
        with _apart(cost), self.budget.spent_on(count + 1, count, context.number):
            replicas = self.models.replicas(count + 1)[1:]
            for replica, client in zip(replicas, clients, strict=False):
                self.models.states.load(client.number, replica)
            losses = self._losses(replicas, clients, context)
            weights = [client.weight for client in clients] or [0.0]
            listed = sorted(participants)[:_MOST_CLIENTS]
            sums = {}
            finds = CAUSES["backward"] in passes
            layers = list(batchnorm_layers(replicas[0])) if finds else []
            distances_LK3 = torch.zeros(len(layers), len(listed), len(DISTANCES)).double()
            for halves in passes:
                contexts = _run(replicas, losses, weights, halves)
                sums[halves] = GradientSum(replicas[0])
                for replica, weight in zip(replicas, weights, strict=True):
                    sums[halves].add(replica, weight)
                if halves == CAUSES["backward"]:
                    for client, mixed in zip(clients, contexts, strict=False):
                        if client.number in listed:
                            position = listed.index(client.number)
                            distances_LK3[:, position] = mixed.mean_distances()
            self.models.replicas(1)  # frees the copies
        return Measured(sums, causes, layers, listed if finds else [], distances_LK3, cost)

    def _record(
        self, measured: Measured, context: RoundContext, trained: GradientSum | None
    ) -> ProbeRecord:
        """Adds up what all ranks have found; ``trained`` are training's own gradients, if any."""
        sums, own = measured.sums, _halves_of(context.plan)
        with _apart(measured.cost):
            kinds = [*sums.values(), *([] if trained is None else [trained])]
            tensors = [each for kind in kinds for each in kind.tensors.values()]
            like = tensors[0]
            distances_LK3 = measured.distances_LK3.to(like)
            message = pack([distances_LK3, *tensors])
            unpack(collectives.sum_for_training(message, of_models=True), [distances_LK3, *tensors])
        gradients = {halves: list(each.tensors.values()) for halves, each in sums.items()}
        found = {name: gradients[halves] for name, halves in CAUSES.items() if halves in gradients}
        if trained is not None:
            found["trained"] = list(trained.tensors.values())
            if own == CAUSES["both"] and "both" in measured.causes:
                found["both"] = found["trained"]
        reference = gradients[GLOBAL] if GLOBAL in gradients else found["trained"]
        compared = {name: deviations(each, reference) for name, each in found.items()}
        L, K, _ = distances_LK3.shape
        by_distance = (
            distances_LK3.cpu().double().permute(2, 0, 1).tolist() if L and K else [[]] * 3
        )
        record = ProbeRecord(
            round=context.number,
            layers=measured.layers,
            clients=measured.clients,
            **dict(zip(DISTANCES, by_distance, strict=True)),
            parameters=list(kinds[0].tensors),
            gradient_norm=[norm if isfinite(norm) else None for norm in norms(reference)],
            deviation={
                name: [one.relative for one in each[:-1]] for name, each in compared.items()
            },
            cosine={name: [one.cosine for one in each[:-1]] for name, each in compared.items()},
            total_deviation={name: each[-1].relative for name, each in compared.items()},
            total_cosine={name: each[-1].cosine for name, each in compared.items()},
            **vars(measured.cost),
        )
        # Sums have the order of names, which all ranks know; readers want that of the network.
        model = self.models.model
        return record.reordered(
            [name for name, _ in model.named_modules(remove_duplicate=False)],
            [name for name, _ in model.named_parameters(remove_duplicate=False)],
        )

    def _losses(
        self, replicas: Sequence[nn.Module], clients: Sequence[Client], context: RoundContext
    ) -> list[Callable[[], Tensor]]:
        """Returns a function for each replica that computes the loss of its first batch."""
        loss = self.models.loss
        plain = RoundContext(context.number, context.learning_rate, context.plan)
        if not clients:
            LocalRun(replicas[0], Client(0, 0.0, self.dummy), plain, self.models.config, loss)
            return [partial(loss, replicas[0], self.dummy, eager=True)]
        losses: list[Callable[[], Tensor]] = []
        for replica, client in zip(replicas, clients, strict=True):
            reader = Client(client.number, client.weight, client.samples.apart())
            run = LocalRun(replica, reader, plain, self.models.config, loss)
            losses.append(partial(_seeded_loss, run, run.next_batch()))
        return losses


def _seeded_loss(run: LocalRun, batch: Samples) -> Tensor:
    run.seed_layers()
    return run.loss_function(run.model, batch, eager=True)


def _halves_of(plan: RoundPlan) -> Halves | None:
    """Returns by which statistics the first step of a round trains; None if layers differ."""
    if not plan.synchronised_steps:
        return CAUSES["both"]
    return GLOBAL if plan.layers is None else None


def _passes(plan: RoundPlan, causes: Sequence[str]) -> list[Halves]:
    """Returns the first three combinations that training's first step does not have."""
    wanted = (GLOBAL, *(CAUSES[cause] for cause in causes))
    return [each for each in wanted if each != _halves_of(plan)][:3]


def _run(
    replicas: Sequence[nn.Module],
    losses: Sequence[Callable[[], Tensor]],
    weights: Sequence[float],
    halves: Halves,
) -> list[MixedStatistics]:
    """Runs a pass of all clients; leaves the gradients in the replicas, returns the contexts."""
    layers = batchnorm_layers(replicas[0])
    tag = model_tag(layers, are_copies=True)
    made = {}

    @contextmanager
    def statistics(index: int, lockstep: Lockstep[Tensor] | None) -> Iterator[None]:
        exchange = GlobalStatistics([weights[index]], None, list(layers), lockstep, model_tag=tag)
        made[index] = MixedStatistics(halves, exchange, [layer.eps for layer in layers.values()])
        with normalised_by(replicas[index], made[index]):
            yield
            exchange.close()

    for replica in replicas:
        replica.zero_grad()
    backward_with(statistics, losses)
    return [made[index] for index in range(len(replicas))]


@contextmanager
def _apart(cost: _Cost) -> Iterator[None]:
    """Counts traffic and time of the block in ``cost``, and leaves no trace in training's own."""
    collective_timer.read()
    traffic, states, start = (
        counters.training_traffic.copy(),
        GlobalStates.get(),
        time.perf_counter(),
    )
    try:
        yield
    finally:
        collective_timer.read()
        spent = counters.training_traffic.since(traffic)
        counters.restore(traffic)
        states.set()
    cost.seconds += time.perf_counter() - start
    cost.messages += spent.payload_messages
    cost.bytes += spent.payload_bytes
