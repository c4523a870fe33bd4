"""The clients that a rank hosts, and their local steps.  Each rank hosts one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .algorithms import Algorithm
from .batchnorm import federated_statistics
from .data import Samples, batch_indices


@dataclass(frozen=True)
class Client:
    """A client: its number, its weight p_k (share of all training samples), its samples."""

    number: int
    weight: float
    samples: Samples


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains in a round; SGD is made afresh, so no momentum survives a round."""

    algorithm: Algorithm
    local_steps: int
    batch_size: int
    momentum: float
    weight_decay: float
    seed: int

    def run(
        self, model: nn.Module, client: Client, round_number: int, learning_rate: float
    ) -> Tensor:
        """Train ``model`` in place on the client's samples; its mean loss, 0-d float64."""
        model.train()
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        losses = []
        for step, batch in enumerate(self._batches(client, round_number)):
            optimizer.zero_grad()
            with self._statistics(step, model, client.weight):
                loss = cross_entropy(model(batch.inputs), batch.labels)
                loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).double().mean()

    def _batches(self, client: Client, round_number: int) -> list[Samples]:
        indices_EB = batch_indices(
            len(client.samples),
            self.batch_size,
            self.local_steps,
            self.seed,
            client.number,
            round_number,
        ).to(client.samples.labels.device)
        return [client.samples[indices_B] for indices_B in indices_EB]

    def _statistics(
        self, step: int, model: nn.Module, weight: float
    ) -> AbstractContextManager[None]:
        if step < self.algorithm.synchronised_steps:
            return federated_statistics(model, weight)
        return nullcontext()
