"""What is evaluated: the global model, or each client's own, on test and training samples.

Where algorithms leave each client a model of its own there is no global one to judge: then the
mean stands for it over the models of all clients that have ever been drawn (``eval_clients`` of
them); the others' have not been trained.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..data.client_store import ClientStore
from ..data.datasets import Dataset
from ..data.partition import Indices
from ..distributed import collectives, process_group
from ..distributed.model_average import model_tensors
from ..runtime import random_streams
from ..training.client_state import PrivateStates
from .metrics import Evaluation, OverClients, evaluate, in_mix, over_clients, table


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluation, the same on all ranks."""

    test: Evaluation
    """Of the global model on the test set, or the mean over the clients' own models."""
    over_clients: OverClients | None
    """If clients have models of their own."""
    pooled_train_loss: float | None
    """sum_k p_k F_k over all training samples, or those drawn for it; where clients have models of
    their own, over those that are judged, each with its own model."""


class Evaluator:
    """Evaluates after a round."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        store: ClientStore,
        states: PrivateStates,
        config: Config,
    ) -> None:
        self._model = model
        self._store = store
        self._states = states
        self._classes = dataset.classes
        self._chosen, self._owners = _chosen(store.parts, config.eval_train_samples, config.seed)
        self._most, self._order = config.eval_clients, _order(config.clients, config.seed)
        everywhere = states.are_models  # else a rank has its share of the samples
        mine = (
            slice(None)
            if everywhere
            else slice(process_group.rank(), None, process_group.world_size())
        )
        places = np.arange(len(dataset.test))[mine]
        self._test = store.test_samples(dataset.test[mine], places)
        if everywhere:
            self._own = copy.deepcopy(model)
            self._plain_test = store.unshifted(dataset.test) if store.shift else self._test
        else:
            self._train = store.of_clients(self._chosen[mine], self._owners[mine])

    def judge(self) -> EvaluationResult:
        """One pass over the test set, for each client if it has a model of its own."""
        if self._states.are_models:
            return self._judge_clients()
        loss = evaluate(self._model, self._train).loss if len(self._chosen) else None
        return EvaluationResult(evaluate(self._model, self._test), None, loss)

    def _judge_clients(self) -> EvaluationResult:
        """The clients are dealt out evenly, and their states move with them."""
        drawn = set(self._states.drawn())
        judged = [client for client in self._order if client in drawn][: self._most]
        hosted = [
            judged[rank :: process_group.world_size()] for rank in range(process_group.world_size())
        ]
        self._states.move(hosted, training=False)
        totals = torch.zeros(3, dtype=torch.float64, device=self._test.labels.device)
        rows: dict[int, Tensor] = {}
        for client in hosted[process_group.rank()]:
            model = self._model_of(client)
            rows[client] = self._row(client, model)
            mine = self._chosen[self._owners == client]
            if len(mine):
                samples = self._store.of_clients(mine, np.full(len(mine), client))
                totals += table(model, samples, 1)[0]
        found = over_clients(rows, judged, self._test.labels)
        loss, _, count = collectives.values_of_sum(totals)
        return EvaluationResult(found.test, found, loss / count if count else None)

    def _row(self, client: int, model: nn.Module) -> Tensor:
        """Loss and accuracy of a client on the test set, then in its own mix, (4,)."""
        on_test_C3 = own_C3 = table(model, self._test, self._classes)
        if self._store.shift is not None:
            own_C3 = table(model, self._store.shifted(self._plain_test, client), self._classes)
        summed = on_test_C3.sum(0)
        return torch.cat([summed[:2] / summed[2], in_mix(own_C3, self._store.label_mix(client))])

    @torch.no_grad()
    def _model_of(self, client: int) -> nn.Module:
        values = zip(model_tensors(self._own), model_tensors(self._model), strict=True)
        for own, of_all in values:
            own.copy_(of_all)
        self._states.load(client, self._own)
        return self._own


def _order(clients: int, seed: int) -> list[int]:
    """In which clients come to be judged, if there are more than are asked for."""
    rng = random_streams.generator(random_streams.JUDGED, seed)
    return [int(client) for client in rng.permutation(clients)]


def _chosen(parts: list[Indices], samples: int, seed: int) -> tuple[Indices, Indices]:
    """Training samples to take the loss of, all or a random ``samples``, and their clients."""
    indices = np.concatenate(parts)
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    if samples < len(indices):
        rng = random_streams.generator(random_streams.TRAIN_LOSS, seed)
        places = np.sort(rng.choice(len(indices), samples, replace=False))
        indices, owners = indices[places], owners[places]
    return indices, owners
