"""What is evaluated: the global model, or each client's own, on test and training samples.

Where algorithms leave each client a model of its own there is no global one to judge: then the
mean over all clients' models stands for it, and a client is judged on the rank that has its state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from . import comm, streams
from .average import model_tensors
from .clients import ClientStore
from .data import Dataset
from .evaluate import Evaluation, OverClients, evaluate, in_mix, over_clients, table
from .partition import Indices
from .private import PrivateStates


@dataclass(frozen=True)
class Judgement:
    """An evaluation, the same on all ranks."""

    test: Evaluation
    """Of the global model on the test set, or the mean over the clients' own models."""
    over_clients: OverClients | None
    """If clients have models of their own."""
    pooled_train_loss: float | None
    """sum_k p_k F_k over all training samples, or those drawn for it; of each client's own model
    if it has one."""


class Judge:
    """Evaluates after a round."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        store: ClientStore,
        states: PrivateStates,
        train_samples: int,
        seed: int,
    ) -> None:
        self._model = model
        self._store = store
        self._states = states
        self._classes = dataset.classes
        self._test_indices = dataset.test
        self._chosen, self._owners = _chosen(store.parts, train_samples, seed)
        if states.exist:
            self._own = copy.deepcopy(model)
            self._test = store.test_samples(dataset.test, np.arange(len(dataset.test)))
        else:
            mine = slice(comm.rank(), None, comm.world_size())
            places = np.arange(len(dataset.test))[mine]
            self._test = store.test_samples(dataset.test[mine], places)
            self._train = store.of_clients(self._chosen[mine], self._owners[mine])

    def judge(self) -> Judgement:
        """One pass over the test set, for each client if it has a model of its own."""
        if self._states.exist:
            return self._judge_clients()
        loss = evaluate(self._model, self._train).loss if len(self._chosen) else None
        return Judgement(evaluate(self._model, self._test), None, loss)

    def _judge_clients(self) -> Judgement:
        clients = [
            client
            for client in range(len(self._store.sizes))
            if self._states.owner(client) == comm.rank()
        ]
        rows = list(self._rows(clients))
        found = over_clients(rows, len(self._store.sizes), self._test.labels)
        loss = self._train_loss(clients) if len(self._chosen) else None
        return Judgement(found.test, found, loss)

    def _rows(self, clients: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Loss and accuracy of each client on the test set, then in its own mix."""
        untouched: Tensor | None = None
        for client in clients:
            model = self._model_of(client)
            if self._states.is_first(client) and untouched is not None:
                on_test_C3 = untouched
            else:
                on_test_C3 = table(model, self._test, self._classes)
            if self._states.is_first(client):
                untouched = on_test_C3
            own_C3 = on_test_C3
            if self._store.shift is not None:
                own = self._store.shifted_test(self._test_indices, client)
                own_C3 = table(model, own, self._classes)
            summed = on_test_C3.sum(0)
            mix = self._store.label_mix(client)
            yield client, torch.cat([summed[:2] / summed[2], in_mix(own_C3, mix)])

    def _train_loss(self, clients: list[int]) -> float:
        """sum_k p_k F_k with each client's own model."""
        totals = torch.zeros(3, dtype=torch.float64, device=self._test.labels.device)
        for client in clients:
            mine = self._chosen[self._owners == client]
            samples = self._store.of_clients(mine, np.full(len(mine), client))
            totals += table(self._model_of(client), samples, 1)[0]
        loss, _, count = comm.sum_over_ranks(totals).tolist()
        return float(loss / count)

    @torch.no_grad()
    def _model_of(self, client: int) -> nn.Module:
        values = zip(model_tensors(self._own), model_tensors(self._model), strict=True)
        for own, of_all in values:
            own.copy_(of_all)
        self._states.load(client, self._own)
        return self._own


def _chosen(parts: list[Indices], samples: int, seed: int) -> tuple[Indices, Indices]:
    """Training samples to take the loss of, all or a random ``samples``, and their clients."""
    indices = np.concatenate(parts)
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    if samples < len(indices):
        rng = streams.generator(streams.TRAIN_LOSS, seed)
        places = np.sort(rng.choice(len(indices), samples, replace=False))
        indices, owners = indices[places], owners[places]
    return indices, owners
