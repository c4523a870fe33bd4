"""The round loop: the numbered steps of a round, on each rank."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NoReturn

from torch import nn

from ..config.algorithms import AUTO, plan
from ..config.errors import RunError, Stopped
from ..config.schema import Config
from ..data.client_store import Client, ClientStore
from ..distributed import collective_timer, consistency, counters, process_group
from ..evaluation.callbacks import RoundCallback
from ..evaluation.early_stopping import BestEvaluation
from ..evaluation.evaluator import EvaluationResult, Evaluator
from ..evaluation.probe_records import ProbeRecord
from ..evaluation.records import RoundRecord
from ..probing.probe import Measured, Probe
from ..probing.schedule import Schedule
from ..runtime import signals
from ..runtime.signals import StopRequest
from ..training.client_sampling import assign, draw
from ..training.cohort import Cohort
from ..training.local_step import GradientSum, RoundContext
from .callbacks import as_run_error, tell
from .round_losses import RoundLosses


@dataclass
class Trainer:
    """Runs all rounds on one rank."""

    config: Config
    store: ClientStore
    cohort: Cohort
    evaluator: Evaluator
    probe: Probe
    schedule: Schedule
    stop: StopRequest = field(default_factory=StopRequest)
    """Signals that this rank has received; the ranks agree on one at the end of each round."""

    def __post_init__(self) -> None:
        self.store.read_ahead(self._batch_order)

    @property
    def model(self) -> nn.Module:
        """The global model."""
        return self.cohort.model

    def train(
        self, callbacks: Sequence[RoundCallback], history: Sequence[RoundRecord] = ()
    ) -> list[RoundRecord]:
        """Runs the rounds after those of ``history`` and returns the records of all rounds.

        The last one is ``rounds``, or an earlier one after which ``early_stopping`` ends the run.

        Every rank calls it, with its own ``callbacks``.  Raises ``RunError``: on every rank if a
        loss is not finite or the models differ, and on one rank for what happens there alone;
        ``Stopped`` on every rank, after a whole round, if a signal has asked one of them to stop.
        """
        records = list(history)
        best = BestEvaluation(self.config.early_stopping, records)
        self.stop.has_begun_rounds = True
        while len(records) < self.config.rounds and not best.reason_to_stop():
            with as_run_error():
                number = len(records) + 1
                records.append(self.round(number))
                best.add(records[-1])
                # 8. Report: files, display, a checkpoint if it is due, and the user's callbacks.
                for record in self.schedule.probes[-1:]:
                    if record.round == number:
                        tell(callbacks, "round_probed", record, self.stop)
                tell(callbacks, "round_ended", records[-1], self.stop)
                # 9. Stop if a signal has asked for it, unless the run ends here.
                is_over = number == self.config.rounds or best.reason_to_stop()
                if self.stop.agreed_signal and not is_over:
                    self._stop_by_signal(number)
        return records

    def round(self, number: int) -> RoundRecord:
        """Trains and averages in round ``number``, and evaluates if that is due."""
        counters.progress.round = number
        collective_timer.read()  # drops the times of a round that was interrupted
        traffic, start = counters.training_traffic.copy(), time.perf_counter()
        # 1. Sample the participants and assign them to ranks; every rank finds the same result.
        weights = self._participants(number)
        clients = self._hosted(weights)
        # 2. Local steps of the clients, the first ones with global statistics.
        context, measured = self._begin(number, clients, weights)
        model_sum = self.cohort.begin_round(context)
        losses = self.cohort.runner.run(clients, context, model_sum)
        # 3. Average the models over all clients; each rank takes the server's step.
        self.cohort.end_round(model_sum)
        # 4. Exchange the losses of all participants; stop if one of them is not finite.
        device = next(self.model.parameters()).device
        train_loss = RoundLosses(weights, clients, device).mean(number, losses, self.stop)
        collective_timer.read()
        round_end = time.perf_counter()
        traffic = counters.training_traffic.since(traffic)
        if measured is not None:
            start += measured.cost.seconds
            self.schedule.note(self.probe.finish(measured, context))
        # 5. Check that all ranks hold the same model.
        if self._is_due(number, self.config.check_every or self.config.eval_every):
            self._check_agreement(number)
        # 6. Evaluate.
        is_due = self._is_due(number, self.config.eval_every)
        figures = self._evaluate(number).figures() if is_due else {}
        # 7. Record the round.
        return RoundRecord(
            round=number,
            clients=len(weights),
            train_loss=train_loss,
            learning_rate=context.learning_rate,
            round_seconds=round_end - start,
            evaluation_seconds=time.perf_counter() - round_end,
            comm_messages=traffic.messages,
            comm_bytes=traffic.bytes,
            payload_messages=traffic.payload_messages,
            payload_bytes=traffic.payload_bytes,
            statistics_seconds=traffic.statistics_seconds,
            average_seconds=traffic.average_seconds,
            client_messages=traffic.client_messages,
            client_bytes=traffic.client_bytes,
            client_seconds=traffic.client_seconds,
            **figures,
        )

    def probe_round(self, number: int) -> ProbeRecord:
        """Probes the model on the first batches of a round that is not trained.

        Every rank calls it.  Raises ``RunError`` if the clients of a rank do not fit in memory.
        """
        counters.progress.round = number
        weights = self._participants(number)
        context = RoundContext(number, self.config.optimizer.lr, plan(self.config, number))
        return self.probe.alone(self._hosted(weights), context, [*weights])

    def _begin(
        self, number: int, clients: Sequence[Client], weights: dict[int, float]
    ) -> tuple[RoundContext, Measured | None]:
        """Returns the facts of a round, and what the probe measures before it, if that is due."""
        rate, this_plan = self._learning_rate(number), self.schedule.plan(number)
        causes = self.schedule.causes(number)
        if not causes:
            return RoundContext(number, rate, this_plan), None
        context = RoundContext(number, rate, this_plan, GradientSum(self.model))
        return context, self.probe.measure(clients, context, [*weights], causes)

    def _participants(self, number: int) -> dict[int, float]:
        config = self.config
        per_round, rule = config.clients_per_round, config.participation
        return draw(self.store.shares, per_round, rule, config.seed, number)

    def _hosted(self, weights: dict[int, float]) -> list[Client]:
        """Returns this rank's participants, with the private states that they have."""
        groups, ranks = self._assigned(weights), self.cohort.ranks
        size = ranks.part.members
        hosts = (clients if member == 0 else [] for clients in groups for member in range(size))
        self.cohort.states.move([*hosts])
        clients = groups[ranks.number]
        self.cohort.states.lend(clients, ranks)
        return self.store.host({client: weights[client] for client in clients})

    def _assigned(self, weights: dict[int, float]) -> list[list[int]]:
        """Returns the participants by group of ranks that hold a client together.

        The cost of a client is the samples of its batches.
        """
        batch, sizes = self.config.batch_size, self.store.sizes
        costs = {client: min(batch, sizes[client]) * self.store.steps[client] for client in weights}
        return assign(costs, process_group.world_size() // self.cohort.ranks.part.members)

    def _batch_order(self, number: int) -> Iterator[tuple[int, int]] | None:
        """Returns (client, step) of this rank's batches in a round in the order of their use.

        Returns None after the last round.
        """
        if number > self.config.rounds:
            return None
        clients = self._assigned(self._participants(number))[self.cohort.ranks.number]
        steps = self.store.steps
        hosted = [steps[client] for client in clients]
        together = 0
        if self.config.algorithm.synchronise_every != AUTO:  # else the plan is not known yet
            this_plan = plan(self.config, number)
            together = self.cohort.runner.steps_together(hosted, this_plan)
        return chain(
            ((client, step) for step in range(together) for client in clients),
            ((client, step) for client in clients for step in range(together, steps[client])),
        )

    def _learning_rate(self, number: int) -> float:
        factor = self.config.lr_schedule.factor(number, self.config.rounds)
        return self.config.optimizer.lr * factor

    def _is_due(self, number: int, every: int) -> bool:
        return number % every == 0 or number == self.config.rounds

    def _check_agreement(self, number: int) -> None:
        if ranks := consistency.ranks_that_differ(self.model):
            raise RunError(
                f"round {number}: after the average the model of ranks {ranks} is not rank 0's",
                on_all_ranks=True,
            )

    def _evaluate(self, number: int) -> EvaluationResult:
        result = self.evaluator.evaluate()
        if bad := result.not_finite():
            message = f"round {number}: the loss of {bad}; a smaller optimizer.lr may help"
            raise RunError(message, on_all_ranks=True)
        return result

    def _stop_by_signal(self, number: int) -> NoReturn:
        process_group.barrier()  # no rank leaves before the checkpoint is on the disk
        name, resumes = signals.name(self.stop.agreed_signal), self.config.resume == "auto"
        then = "the same command goes on" if resumes else "resume=auto goes on from there"
        message = f"stopped by {name} after round {number}; {then}"
        raise Stopped(message, self.stop.agreed_signal)
