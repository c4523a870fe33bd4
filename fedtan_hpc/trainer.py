"""The round loop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from . import agreement, comm
from .average import average_model
from .cohort import Client, LocalTraining
from .config import Config
from .data import Samples
from .errors import RunError
from .evaluate import Evaluation, evaluate
from .metrics import NullLog, RoundRecord


@dataclass
class Trainer:
    """One rank's part in all rounds."""

    config: Config
    model: nn.Module
    client: Client
    training: LocalTraining
    test_share: Samples
    """The part of the test set that this rank evaluates."""

    def train(self, logs: Sequence[NullLog]) -> list[RoundRecord]:
        """Run all rounds, telling ``logs`` of each; the last round is evaluated.

        Raises ``RunError``: on every rank if a loss is not finite or the models differ, and on the
        rank concerned for anything else that goes wrong.
        """
        records = []
        for number in range(1, self.config.rounds + 1):
            try:
                records.append(self._round(number))
                for log in logs:
                    log.round(records[-1])
            except RunError:
                raise
            except Exception as error:
                where = f"rank {comm.rank()}, round {number}"
                cause = f"{where}: {type(error).__name__}: {error}"
                raise RunError(cause, on_all_ranks=False) from error
        return records

    def _round(self, number: int) -> RoundRecord:
        traffic, start = comm.training_traffic.copy(), time.perf_counter()
        # 1. Local steps from the global model, the first ones with global statistics.
        rate = self._learning_rate(number)
        loss = self.training.run(self.model, self.client, number, rate)
        # 2. The new global model is the average of the clients' models.
        average_model(self.model, self.client.weight)
        # 3. All clients' losses; a round that went wrong stops the run here.
        train_loss = self._train_loss(loss, number)
        seconds = time.perf_counter() - start
        spent = comm.training_traffic.since(traffic)
        # 4. Now and then: do all ranks hold the same model, and how good is it?
        judged = None
        if self._is_due(number, self.config.check_every or self.config.eval_every):
            self._check_agreement(number)
        if self._is_due(number, self.config.eval_every):
            judged = evaluate(self.model, self.test_share)
        return self._record(number, train_loss, judged, rate, seconds, spent)

    def _learning_rate(self, number: int) -> float:
        """lr times gamma for each milestone that lies behind."""
        schedule = self.config.lr_schedule
        passed = sum(1 for milestone in schedule.milestones if milestone < number)
        return self.config.optimizer.lr * schedule.gamma**passed

    def _train_loss(self, loss: Tensor, number: int) -> float:
        """sum_k p_k loss_k; every rank learns all losses, so that all stop together."""
        losses = loss.new_zeros(2, self.config.clients)
        losses[0, self.client.number] = loss
        losses[1, self.client.number] = self.client.weight
        values, weights = comm.sum_over_ranks(losses).tolist()
        bad = [client for client, value in enumerate(values) if not math.isfinite(value)]
        if bad:
            clients = f"client {bad[0]}" if len(bad) == 1 else f"clients {bad}"
            raise RunError(
                f"round {number}: the training loss of {clients} is not finite "
                f"({values[bad[0]]}); a smaller optimizer.lr may help",
                on_all_ranks=True,
            )
        return float(sum(p * value for p, value in zip(weights, values, strict=True)))

    def _is_due(self, number: int, every: int) -> bool:
        return number % every == 0 or number == self.config.rounds

    def _check_agreement(self, number: int) -> None:
        if ranks := agreement.ranks_that_differ(self.model):
            raise RunError(
                f"round {number}: after the average the model of ranks {ranks} is not rank 0's",
                on_all_ranks=True,
            )

    def _record(
        self,
        number: int,
        train_loss: float,
        judged: Evaluation | None,
        rate: float,
        seconds: float,
        spent: comm.Traffic,
    ) -> RoundRecord:
        return RoundRecord(
            round=number,
            train_loss=train_loss,
            test_loss=judged.loss if judged else None,
            test_accuracy=judged.accuracy if judged else None,
            learning_rate=rate,
            round_seconds=seconds,
            comm_messages=spent.messages,
            comm_bytes=spent.bytes,
            clients=self.config.clients,
        )
