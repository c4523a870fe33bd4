"""One client's local steps in a round, on a model of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .algorithms import Algorithm
from .clients import Client
from .data import Samples, batch_indices


@dataclass(frozen=True)
class LocalTraining:
    """How clients train; SGD is made afresh for each round, so no momentum survives it."""

    algorithm: Algorithm
    local_steps: int
    batch_size: int
    momentum: float
    weight_decay: float
    seed: int

    def start(
        self, model: nn.Module, client: Client, round_number: int, learning_rate: float
    ) -> LocalRun:
        """Make ready to train ``model`` in place on the client's batches of this round."""
        model.train()
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        return LocalRun(model, client, optimizer, self._batches(client, round_number), [])

    def _batches(self, client: Client, round_number: int) -> Tensor:
        """Indices into the client's samples, (E, B), on their device."""
        indices_EB = batch_indices(
            len(client.samples),
            self.batch_size,
            self.local_steps,
            self.seed,
            client.number,
            round_number,
        )
        return indices_EB.to(client.samples.labels.device)


@dataclass(frozen=True)
class LocalRun:
    """The steps of a client in a round, taken one at a time."""

    model: nn.Module
    client: Client
    optimizer: torch.optim.Optimizer
    batches_EB: Tensor
    losses: list[Tensor]
    """Of the steps taken."""

    def loss(self) -> Tensor:
        """The loss F_k of the next step's batch, 0-d; clears the gradients first."""
        self.optimizer.zero_grad()
        return loss_of(self.model, self.next_batch())

    def next_batch(self) -> Samples:
        """The samples of the next step."""
        return self.client.samples[self.batches_EB[len(self.losses)]]

    def step(self, loss: Tensor) -> None:
        """Follow the gradients that the backward pass of ``loss`` has left."""
        self.optimizer.step()
        self.losses.append(loss.detach())

    def finish(self) -> Tensor:
        """All steps that are left, with local statistics; the mean loss of all, 0-d float64.

        Momentum is let go: it does not survive the round, and there may be many clients.
        """
        while len(self.losses) < len(self.batches_EB):
            loss = self.loss()
            loss.backward()
            self.step(loss)
        self.optimizer.state.clear()
        return torch.stack(self.losses).double().mean()


def loss_of(model: nn.Module, batch: Samples) -> Tensor:
    """Mean cross-entropy of ``model`` on ``batch``."""
    return cross_entropy(model(batch.inputs), batch.labels)
