"""The round loop."""

from __future__ import annotations

import errno
import math
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..config.algorithms import plan
from ..config.errors import RunError, Stopped
from ..config.schema import Config
from ..data.client_store import Client, ClientStore
from ..distributed import collective_timer, collectives, consistency, counters, process_group
from ..distributed.counters import CommCounters
from ..evaluation.evaluator import EvaluationResult, Evaluator
from ..evaluation.records import RoundCallback, RoundRecord
from ..runtime import signals
from ..runtime.signals import ASKING, StopRequest
from ..runtime.transfer import send
from ..training.client_sampling import assign, draw
from ..training.cohort import Cohort
from ..training.local_training import RoundContext
from .checkpoint_writer import CheckpointWriter

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass
class Trainer:
    """One rank's part in all rounds."""

    config: Config
    store: ClientStore
    cohort: Cohort
    judge: Evaluator
    stop: StopRequest = field(default_factory=StopRequest)
    """Set by signals of this rank; the ranks agree on it at the end of each round."""

    @property
    def model(self) -> nn.Module:
        """The global model."""
        return self.cohort.model

    def train(
        self,
        logs: Sequence[RoundCallback],
        keeper: CheckpointWriter | None = None,
        history: Sequence[RoundRecord] = (),
    ) -> list[RoundRecord]:
        """Run the rounds after those of ``history``, telling ``logs`` of each; returns all records.

        The last round is evaluated.  Raises ``RunError``: on every rank if a loss is not finite or
        the models differ, and on the rank concerned for anything else that goes wrong; ``Stopped``
        on every rank when a signal has asked one of them, after its round.
        """
        records = list(history)
        self.stop.in_rounds = True
        for number in range(len(records) + 1, self.config.rounds + 1):
            try:
                records.append(self.round(number))
                self._tell(records[-1], logs)
                is_last = number == self.config.rounds
                asked = self.stop.agreed and not is_last
                if keeper and not is_last and (asked or keeper.is_due(number)):
                    keeper.save(number, self.cohort)
                if asked:
                    self._leave(number, keeper)
            except RunError:
                raise
            except Exception as error:
                raise _failure(error, number) from (None if _has_no_place(error) else error)
        return records

    def _tell(self, record: RoundRecord, logs: Sequence[RoundCallback]) -> None:
        """A reader that the signal ended too is no reason not to save the round."""
        for log in logs:
            with suppress(*[BrokenPipeError] if self.stop.agreed else []):
                log.round(record)

    def _leave(self, number: int, keeper: CheckpointWriter | None) -> None:
        """The end that a signal has asked for; nobody leaves before the checkpoint is there."""
        if keeper:
            keeper.wait()
        process_group.barrier()
        name, then = signals.name(self.stop.agreed), ""
        if keeper:
            again = self.config.resume == "auto"
            then = "; the same command goes on" if again else "; resume=auto goes on from there"
        raise Stopped(f"stopped by {name} after round {number}{then}", self.stop.agreed)

    def round(self, number: int) -> RoundRecord:
        """One round of all clients, evaluated if it is due."""
        counters.progress.round = number
        collective_timer.read()  # what an interrupted round has left
        traffic, start = counters.training_traffic.copy(), time.perf_counter()
        # 1. Who takes part, and which of them this rank hosts: every rank finds the same.
        weights = self._participants(number)
        clients = self._hosted(weights)
        # 2. Local steps, the first ones with global statistics; then the average of all models.
        rate = self._learning_rate(number)
        now = RoundContext(number, rate, plan(self.config, number))
        losses = self.cohort.train(clients, now)
        # 3. All participants' losses; a round that went wrong stops the run here.
        train_loss = self._train_loss(weights, clients, losses, number)
        collective_timer.read()
        seconds = time.perf_counter() - start
        spent = counters.training_traffic.since(traffic)
        evaluating = time.perf_counter()
        # 4. Now and then: do all ranks hold the same model, and how good is it?
        if self._is_due(number, self.config.check_every or self.config.eval_every):
            self._check_agreement(number)
        judged = None
        if self._is_due(number, self.config.eval_every):
            judged = self._evaluate(number)
        apart = time.perf_counter() - evaluating
        return _record(now, train_loss, judged, (seconds, apart), spent, len(weights))

    def _participants(self, number: int) -> dict[int, float]:
        config = self.config
        per_round, rule = config.clients_per_round, config.participation
        return draw(self.store.shares, per_round, rule, config.seed, number)

    def _hosted(self, weights: dict[int, float]) -> list[Client]:
        """This rank's participants; a client costs as much as its batches are large."""
        batch = self.config.batch_size
        costs = {client: min(batch, self.store.sizes[client]) for client in weights}
        hosted = assign(costs, process_group.world_size())
        self.cohort.states.move(hosted)
        return self.store.host({client: weights[client] for client in hosted[process_group.rank()]})

    def _learning_rate(self, number: int) -> float:
        """lr times gamma for each milestone that lies behind."""
        schedule = self.config.lr_schedule
        passed = sum(1 for milestone in schedule.milestones if milestone < number)
        return self.config.optimizer.lr * schedule.gamma**passed

    def _train_loss(
        self,
        weights: dict[int, float],
        clients: Sequence[Client],
        losses: Sequence[Tensor],
        number: int,
    ) -> float:
        """sum_k p_k loss_k; every rank learns all losses, so that all stop together.

        The same message says whether a signal has asked any rank to stop, and which.
        """
        place = {client: position for position, client in enumerate(weights)}
        of_all = self._zeros(len(weights) + 2)
        for client, loss in zip(clients, losses, strict=True):
            of_all[place[client.number]] = loss
        asked = self.stop.signal
        asking = torch.tensor([asked, bool(asked)], dtype=of_all.dtype, device="cpu")
        of_all[-2:] = send(asking, of_all.device)
        *every, total, ranks = collectives.values_of_sum(of_all)
        self.stop.agreed = _common(total, ranks)
        values = dict(zip(weights, every, strict=True))
        bad = [client for client, value in values.items() if not math.isfinite(value)]
        if bad:
            # Global statistics carry one client's bad samples to all: look for the source.
            bad = self._with_bad_samples(weights, clients) or bad
            whose = f"client {bad[0]}" if len(bad) == 1 else f"clients {bad}"
            raise RunError(
                f"round {number}: the training loss of {whose} is not finite "
                f"({values[bad[0]]}); a smaller optimizer.lr may help",
                on_all_ranks=True,
            )
        return float(sum(weights[client] * value for client, value in values.items()))

    def _with_bad_samples(self, weights: dict[int, float], clients: Sequence[Client]) -> list[int]:
        """Participants whose inputs are not all finite."""
        place = {client: position for position, client in enumerate(weights)}
        found = self._zeros(len(weights))
        for client in clients:
            found[place[client.number]] = not bool(client.samples.inputs.isfinite().all())
        counts = collectives.values_of_sum(found)
        return [client for client, count in zip(weights, counts, strict=True) if count]

    def _zeros(self, number: int) -> Tensor:
        device = next(self.model.parameters()).device
        return torch.zeros(number, dtype=torch.float64, device=device)

    def _evaluate(self, number: int) -> EvaluationResult:
        judged = self.judge.judge()
        of_train = 0.0 if judged.pooled_train_loss is None else judged.pooled_train_loss
        own = judged.over_clients
        if own and own.not_finite:
            which, loss = f"the models of clients {own.not_finite[:10]}", judged.test.loss
        elif not math.isfinite(judged.test.loss):
            which, loss = "the averaged model on the test set", judged.test.loss
        elif not math.isfinite(of_train):
            which, loss = "the averaged model on the training set", of_train
        else:
            return judged
        raise RunError(
            f"round {number}: the loss of {which} is not finite ({loss}); "
            "a smaller optimizer.lr may help",
            on_all_ranks=True,
        )

    def _is_due(self, number: int, every: int) -> bool:
        return number % every == 0 or number == self.config.rounds

    def _check_agreement(self, number: int) -> None:
        if ranks := consistency.ranks_that_differ(self.model):
            raise RunError(
                f"round {number}: after the average the model of ranks {ranks} is not rank 0's",
                on_all_ranks=True,
            )


def _failure(error: Exception, number: int) -> RunError:
    """What one rank met, with its name and round."""
    where = f"rank {process_group.rank()}, round {number}"
    if process_group.has_lost_a_rank(error):
        what = f"another rank has ended ({str(error).splitlines()[0]})"
    else:
        what = f"{type(error).__name__}: {error}"
    return RunError(f"{where}: {what}", on_all_ranks=False)


def _has_no_place(error: Exception) -> bool:
    """Whether the place in the code would tell nothing: the disk, or another rank, is the cause."""
    disk_is_full = isinstance(error, OSError) and error.errno in _FULL
    return disk_is_full or process_group.has_lost_a_rank(error)


def _common(signals: float, ranks: float) -> int:
    """The signal that so many ranks got, from the sum of their numbers; TERM if they differ."""
    number = signals / ranks if ranks else 0
    return int(number) if number in (0, *ASKING) else int(signal.SIGTERM)


def _record(
    now: RoundContext,
    train_loss: float,
    judged: EvaluationResult | None,
    seconds: tuple[float, float],
    spent: CommCounters,
    clients: int,
) -> RoundRecord:
    """``seconds`` of the round itself and of its evaluation."""
    own = judged.over_clients if judged else None
    return RoundRecord(
        round=now.number,
        train_loss=train_loss,
        test_loss=judged.test.loss if judged else None,
        test_accuracy=judged.test.accuracy if judged else None,
        pooled_train_loss=judged.pooled_train_loss if judged else None,
        clients_judged=own.clients if own else None,
        clients_test_accuracy_mean=own.test.accuracy if own else None,
        clients_test_accuracy_spread=own.test_spread if own else None,
        clients_own_mix_accuracy_mean=own.own_mix.accuracy if own else None,
        clients_own_mix_accuracy_spread=own.own_mix_spread if own else None,
        learning_rate=now.learning_rate,
        round_seconds=seconds[0],
        comm_messages=spent.messages,
        comm_bytes=spent.bytes,
        payload_messages=spent.sums,
        payload_bytes=spent.payload,
        clients=clients,
        statistics_seconds=spent.statistics_seconds,
        average_seconds=spent.average_seconds,
        evaluation_seconds=seconds[1],
    )
