"""One client's local steps in a round, on a model of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..batchnorm.layer import batchnorm_layers
from ..batchnorm.running_norm import held
from ..config.algorithms import Normaliser, RoundPlan
from ..config.enums import SamplingName
from ..data.augmentation import Augmentation, AugmentationParams
from ..data.batching import Samples, batch_indices
from ..data.client_store import Client
from ..runtime import random_streams
from ..runtime.transfer import send
from . import sgd
from .loss import Loss


@dataclass(frozen=True)
class RoundContext:
    """A round as every rank knows it beforehand."""

    number: int
    learning_rate: float
    plan: RoundPlan


@dataclass(frozen=True)
class LocalTraining:
    """How clients train; SGD is made afresh for each round, so no momentum survives it."""

    local_steps: int
    batch_size: int
    momentum: float
    weight_decay: float
    seed: int
    proximal_mu: float = 0.0
    sampling: SamplingName = SamplingName.shuffled
    augmentation: Augmentation | None = None
    loss: Loss = field(default_factory=Loss)

    def start(self, model: nn.Module, client: Client, now: RoundContext) -> LocalRun:
        """Make ready to train ``model`` in place on the client's batches of this round."""
        set_training_mode(model, now.plan)
        optimizer = sgd.sgd(model.parameters(), now.learning_rate, self.momentum, self.weight_decay)
        running = now.plan.normaliser is Normaliser.running
        batches_EB = self._batches(client, now.number)
        rng = random_streams.generator(random_streams.LAYERS, self.seed, client.number, now.number)
        return LocalRun(
            model=model,
            client=client,
            optimizer=optimizer,
            pull=ProximalTerm(list(model.parameters()), self.proximal_mu),
            context=held(model) if running else nullcontext(),
            batches_EB=batches_EB,
            decisions=self._decisions(client, now.number, batches_EB),
            seeds=rng.integers(2**63, size=self.local_steps).tolist(),
            loss_function=self.loss,
        )

    def _batches(self, client: Client, round_number: int) -> Tensor:
        """Indices into the client's samples, (E, B), on their device."""
        indices_EB = batch_indices(
            len(client.samples),
            self.batch_size,
            self.local_steps,
            self.seed,
            client.number,
            round_number,
            self.sampling,
        )
        return send(indices_EB, client.samples.labels.device)

    def _decisions(
        self, client: Client, round_number: int, batches_EB: Tensor
    ) -> AugmentationParams | None:
        """What is done to the images of those batches."""
        if self.augmentation is None:
            return None
        drawn = self.augmentation.draw(self.seed, client.number, round_number, *batches_EB.shape)
        return drawn.to(batches_EB.device)


@dataclass(frozen=True)
class LocalRun:
    """The steps of a client in a round, taken one at a time."""

    model: nn.Module
    client: Client
    optimizer: torch.optim.Optimizer
    pull: ProximalTerm
    context: AbstractContextManager[None]
    """In which the steps with statistics of the client's own are taken; it is entered once."""
    batches_EB: Tensor
    decisions: AugmentationParams | None
    seeds: Sequence[int]
    """For layers that draw at random, such as dropout, by step."""
    loss_function: Loss
    losses: list[Tensor] = field(default_factory=list)
    """Of the steps taken."""

    def loss(self, eager: bool = False) -> Tensor:
        """The loss F_k of the next step's batch, 0-d; clears the gradients first."""
        self.optimizer.zero_grad()
        batch = self.next_batch()
        self.seed_layers()
        return self.loss_function(self.model, batch, eager)

    def seed_layers(self) -> None:
        """What layers draw at random in the next step depends on (seed, client, round, step)."""
        seed, device = self.seeds[len(self.losses)], self.batches_EB.device
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def next_batch(self) -> Samples:
        """The samples of the next step."""
        step = len(self.losses)
        batch = self.client.samples[self.batches_EB[step]]
        if self.decisions is None:
            return batch
        return Samples(self.decisions.apply(step, batch.inputs), batch.labels)

    def step(self, loss: Tensor) -> None:
        """Follow the gradients that the backward pass of ``loss`` has left.

        Parameters that took no part in it have the gradient 0, as they do in a stack.
        """
        for value in self.model.parameters():
            if value.grad is None and value.requires_grad:
                value.grad = torch.zeros_like(value)
        self.pull.add_to_gradients()
        sgd.step(self.optimizer)
        self.losses.append(loss.detach().clone())  # where it is, CUDA graphs write the next one

    def finish(self) -> Tensor:
        """All steps that are left, by the client itself; the mean loss of all, 0-d float64.

        Momentum is let go: it does not survive the round, and there may be many clients.
        """
        with self.context:
            while len(self.losses) < len(self.batches_EB):
                loss = self.loss()
                loss.backward()
                self.step(loss)
        self.optimizer.state.clear()
        return torch.stack(self.losses).double().mean()


class ProximalTerm:
    """FedProx (Li et al. 2020): mu (w - w_0) on top of each gradient, w_0 from before the round."""

    def __init__(self, values: Sequence[Tensor], mu: float) -> None:
        self._values, self.mu = values, mu
        self._first = [value.detach().clone() for value in values] if mu else []

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        """Of those values that have one."""
        for value, first in zip(self._values, self._first, strict=False):
            if value.grad is not None:
                value.grad.add_(value - first, alpha=self.mu)


def set_training_mode(model: nn.Module, plan: RoundPlan) -> None:
    """Training mode; BN layers with frozen statistics are in evaluation mode."""
    model.train()
    if plan.normaliser is Normaliser.frozen:
        for layer in batchnorm_layers(model).values():
            layer.eval()
