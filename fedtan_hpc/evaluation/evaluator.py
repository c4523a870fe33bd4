"""Evaluates the global model, or the models of the clients, on test and training samples.

With algorithms that give each client its own model, the mean over the clients' models stands for
the global model.  It covers ``eval_clients`` of the clients that have ever been drawn; models of
other clients are not trained.  Used by ``job``.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..data.batching import Dataset, Samples
from ..data.client_store import ClientStore
from ..data.partition import Indices
from ..distributed import collectives, process_group
from ..distributed.model_average import model_tensors
from ..models.copies import copied
from ..runtime import random_streams
from ..runtime.transfer import copy_all
from ..training.cohort import Cohort
from .metrics import (
    Evaluation,
    Meter,
    OverClients,
    first_number,
    gathered,
    in_mix,
    over_clients,
)
from .records import RoundRecord


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation, equal on all ranks."""

    test: Evaluation
    """The global model on the test set, or the mean over the clients' models."""
    over_clients: OverClients | None
    """The clients' models; None if there is one global model."""
    pooled_train_loss: float | None
    """sum_k p_k F_k over all training samples or ``eval_train_samples`` of them.

    The clients' models count over the samples of the evaluated clients.
    """
    own: OverClients | None = None
    """The global model on the clients' own test samples; None if there are no such."""

    def figures(self) -> dict[str, Any]:
        """Returns the fields of ``RoundRecord`` that an evaluation fills, by name.

        Metrics that are no fields of it are in ``metrics``.
        """
        figures: dict[str, Any] = {
            "test_loss": self.test.loss,
            "pooled_train_loss": self.pooled_train_loss,
            **self.test.recorded("test_"),
        }
        if clients := self.over_clients or self.own:
            figures["clients_judged"] = clients.clients
            metric = first_number(self.test.metrics)
            for what, mean, spread in (
                ("test", clients.test, clients.test_spread),
                ("own_mix", clients.own, clients.own_spread),
            ):
                if metric is not None and (self.over_clients or what == "own_mix"):
                    name = f"clients_{what}_{metric}"
                    figures[f"{name}_mean"] = mean.recorded("")[metric]
                    figures[f"{name}_spread"] = spread.recorded("")[metric]
        known = {each.name for each in fields(RoundRecord)}
        metrics = {name: figures.pop(name) for name in list(figures) if name not in known}
        return {**figures, "metrics": metrics}

    def not_finite(self) -> str:
        """Returns in words which loss is not finite, with its value; empty if all are finite."""
        loss: float | None = self.test.loss
        if self.over_clients and self.over_clients.not_finite:
            which = f"the models of clients {self.over_clients.not_finite[:10]}"
        elif not math.isfinite(self.test.loss):
            which = "the averaged model on the test set"
        elif not math.isfinite(self.pooled_train_loss or 0.0):
            which, loss = "the averaged model on the training set", self.pooled_train_loss
        else:
            return ""
        return f"{which} is not finite ({loss})"


class Evaluator:
    """Evaluates the global model of ``cohort``, or the clients' models if it has such."""

    def __init__(
        self, cohort: Cohort, dataset: Dataset, store: ClientStore, config: Config
    ) -> None:
        model, states = cohort.model, cohort.states
        self._model, self._store, self._states, self._config = model, store, states, config
        self._classes, self._meter = dataset.classes, Meter(cohort.loss.objective)
        self._has_classes = dataset.has_class_numbers
        indices, clients = _train_samples(store.partition, config.eval_train_samples, config.seed)
        self._train_indices, self._train_clients = indices, clients
        self._device = next(model.parameters()).device
        self._clients_with_tests = sorted(store.client_tests)
        test, positions = dataset.test, np.arange(len(dataset.test))
        if states.are_models:
            self._client_model = copied(model)
            self._test = store.test_samples(test, positions)
            self._unshifted_test = store.unshifted_samples(test) if store.shift else self._test
        else:  # each rank evaluates its share of the samples
            share = slice(process_group.rank(), None, process_group.world_size())
            test, positions = test[share], positions[share]
            self._test = store.test_samples(test, positions)
            self._train = store.client_samples(indices[share], clients[share])
        self._test_clients_N = torch.from_numpy(self._clients_of_test(test)).to(self._device)

    def _clients_of_test(self, test: Indices) -> Indices:
        """Returns for each test sample the position of its client among those with own tests.

        It is the number of these clients if the sample belongs to none of them.
        """
        none = len(self._clients_with_tests)
        client_of: dict[int, int] = {}
        for position, client in enumerate(self._clients_with_tests):
            client_of |= dict.fromkeys(self._store.client_tests[client].tolist(), position)
        return np.array([client_of.get(index, none) for index in test.tolist()], dtype=np.int64)

    def evaluate(self) -> EvaluationResult:
        """Evaluates on all ranks together; collective."""
        if self._states.are_models:
            return self._evaluate_clients()
        model, meter = self._model, self._meter
        loss = meter.loss(model, self._train) if len(self._train_indices) else None
        if not self._clients_with_tests:
            return EvaluationResult(meter.evaluate(model, self._test), None, loss)
        totals_GT = meter.summed(self._totals_by_client(model, self._test))
        test = meter.evaluation(totals_GT.sum(0))
        clients = self._clients_with_tests
        rows = {k: (test, meter.evaluation(totals_GT[i])) for i, k in enumerate(clients)}
        return EvaluationResult(test, None, loss, over_clients(rows))

    def _totals_by_client(self, model: nn.Module, samples: Iterable[Samples]) -> Tensor:
        """Returns totals for each client with own tests, and those of the other samples, (G, T)."""
        groups = len(self._clients_with_tests) + 1

        def numbered() -> Iterator[tuple[Samples, Tensor]]:
            start = 0
            for batch in samples:
                yield batch, self._test_clients_N[start : start + len(batch)]
                start += len(batch)

        return self._meter.totals(model, numbered(), groups)

    def _evaluate_clients(self) -> EvaluationResult:
        """Assigns the clients evenly to the ranks, moves their states there and evaluates them."""
        rng = random_streams.generator(random_streams.EVALUATED_CLIENTS, self._config.seed)
        order, drawn = rng.permutation(self._config.clients), set(self._states.drawn())
        clients = [int(client) for client in order if client in drawn][: self._config.eval_clients]
        ranks = process_group.world_size()
        hosted = [clients[rank::ranks] for rank in range(ranks)]
        self._states.move(hosted, training=False)
        train_totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        rows: dict[int, tuple[Evaluation, Evaluation]] = {}
        for client in hosted[process_group.rank()]:
            copy_all(model_tensors(self._client_model), model_tensors(self._model))
            self._states.load(client, self._client_model)
            rows[client] = self._test_row(client)
            indices = self._train_indices[self._train_clients == client]
            if len(indices):
                samples = self._store.client_samples(indices, np.full(len(indices), client))
                batches = ((batch, 0) for batch in samples)
                totals = self._meter.totals(self._client_model, batches, with_metrics=False)
                train_totals += totals[0]
        figures = over_clients(gathered(rows))
        loss, count = collectives.sum_as_list(train_totals)
        return EvaluationResult(figures.test, figures, loss / count if count else None)

    def _test_row(self, client: int) -> tuple[Evaluation, Evaluation]:
        """Evaluates a client's model on the test set, and on the client's own data.

        These are its own test samples, if it has such; else the test samples in its label mix (for
        targets that are classes) and with its shift of inputs.
        """
        model, meter = self._client_model, self._meter
        if client in self._store.client_tests:
            totals_GT = self._totals_by_client(model, self._test)
            own_T = totals_GT[self._clients_with_tests.index(client)]
            return meter.evaluation(totals_GT.sum(0)), meter.evaluation(own_T)
        on_test_CT = in_shift_CT = self._totals_by_class(model, self._test)
        if self._store.shift is not None:
            samples = self._store.shifted_as(self._unshifted_test, client)
            in_shift_CT = self._totals_by_class(model, samples)
        own_T = in_shift_CT.sum(0)
        if self._has_classes:
            own_T = in_mix(in_shift_CT, self._store.label_mix(client))
        return meter.evaluation(on_test_CT.sum(0)), meter.evaluation(own_T)

    def _totals_by_class(self, model: nn.Module, samples: Iterable[Samples]) -> Tensor:
        """Returns totals by class, (C, T); in one row if the targets are no classes."""
        if not self._has_classes:
            return self._meter.totals(model, ((batch, 0) for batch in samples))
        batches = ((batch, batch.labels) for batch in samples)
        return self._meter.totals(model, batches, self._classes)


def _train_samples(partition: Sequence[Indices], count: int, seed: int) -> tuple[Indices, Indices]:
    """Returns indices of all training samples or ``count`` random ones, and their clients."""
    indices = np.concatenate(partition)
    clients = np.repeat(np.arange(len(partition)), [len(part) for part in partition])
    if count < len(indices):
        rng = random_streams.generator(random_streams.TRAIN_LOSS, seed)
        chosen = np.sort(rng.choice(len(indices), count, replace=False))
        indices, clients = indices[chosen], clients[chosen]
    return indices, clients
