"""The local steps of one client: batch, loss, backward pass and optimizer step.

``client_runners`` starts a ``LocalRun`` for each client of a round.  ``stacked`` takes the
steps of many runs as one, ``compile_step`` compiles the loss, ``memory_budget`` measures it.

Shapes: E local steps with batches of B samples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..batchnorm.conversion import batchnorm_layers
from ..batchnorm.running_norm import fixed_global_statistics
from ..config.algorithms import Normaliser, RoundPlan
from ..config.enums import PrecisionName, TaskName
from ..config.schema import Config
from ..data.augmentation import Augmentation, AugmentationParams, augmentation_of
from ..data.batching import BatchSampler, Draw, Samples
from ..data.client_store import Client
from ..runtime import global_random, random_streams
from ..runtime.transfer import send
from ..tasks.objective import Objective
from .client_ranks import ALONE, ClientRanks
from .optimizers import ClientOptimizer, OptimizerSettings, trained_parameters


class GradientSum:
    """sum_k p_k g_k of clients' gradients by parameter name, over the clients of this rank."""

    def __init__(self, module: nn.Module) -> None:
        trained = trained_parameters(module)
        self.tensors = {name: torch.zeros_like(value) for name, value in trained.items()}

    @torch.no_grad()
    def add(self, module: nn.Module, weight: float) -> None:
        """Adds the gradients of a client of ``weight`` p_k; a missing one is 0."""
        for name, value in trained_parameters(module).items():
            if weight and value.grad is not None:
                self.tensors[name].add_(value.grad, alpha=weight)

    @torch.no_grad()
    def add_stack(self, gradients: Mapping[str, Tensor], weights: Sequence[float]) -> None:
        """Adds the gradients of K stacked clients, (K, ...) each by name."""
        for name, value in gradients.items():
            p_K = torch.tensor(weights, dtype=value.dtype, device=value.device)
            self.tensors[name].add_(torch.tensordot(p_K, value, dims=1))


@dataclass(frozen=True)
class RoundContext:
    """The facts of a round that every rank knows before the round starts."""

    number: int
    learning_rate: float
    plan: RoundPlan
    first_gradients: GradientSum | None = None
    """Takes the gradients of the clients' first steps, in a round that is probed."""


_LOSSES = 1024
"""Losses that are kept before they are summed.  Each pins a part of the heap of many KB."""
LossFunction = Callable[[nn.Module, Any, Tensor], Tensor]
"""Maps a model, inputs of N samples and their targets (N, ...) to the mean loss, 0-d."""


@dataclass(frozen=True)
class Loss:
    """The loss of training steps, in full or mixed precision, eager or compiled."""

    mixed: bool = False
    """Whether matrix products and convolutions run in bfloat16; statistics and sums never do."""
    objective: Objective = field(default_factory=Objective)
    """The task's loss of what the model returns."""
    compiled: LossFunction | None = None
    """``objective.mean_loss`` by torch.compile, which compiles its backward pass too."""
    compile_seconds: float = 0.0

    @classmethod
    def of(cls, config: Config) -> "Loss":
        """Returns the loss that the options describe, not compiled."""
        mixed = config.precision is PrecisionName.bfloat16
        return cls(mixed=mixed, objective=Objective.of(config))

    def __call__(self, model: nn.Module, batch: Samples, eager: bool = False) -> Tensor:
        """Returns the mean loss, 0-d.  ``eager`` is for ranks that must run layers in one order."""
        function = self.compiled
        if eager or function is None:
            function = self.objective.mean_loss
        with self.precision(batch.device):
            return function(model, batch.inputs, batch.labels)

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        """Returns the context for forward passes: autocast, or none."""
        if not self.mixed:
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)


@dataclass(frozen=True)
class StepDraws:
    """Random draws for several successive steps of a client, E of them here."""

    batches_EB: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """Indices of the samples, on their device if they are in memory."""
    layer_seeds: Sequence[int] = ()
    """Seeds of the network's random draws, one for each step."""
    augmentation: AugmentationParams | None = None


def _drawn(client: Client, round_number: int, config: Config) -> Iterator[StepDraws]:
    """Yields the draws of a round's steps in parts, so that memory does not grow with them."""
    key, device = (config.seed, client.number, round_number), client.samples.device
    rng = random_streams.generator(random_streams.LAYERS, *key)
    augmentation, generators = augmentation_of(config.data), Augmentation.generators(*key)
    sampler, is_in_memory = BatchSampler.of(config), isinstance(client.samples, Samples)
    for indices_EB in sampler.draw(len(client.samples), client.number, round_number):
        seeds = rng.integers(2**63, size=len(indices_EB)).tolist()
        changes = None
        if augmentation is not None:
            changes = augmentation.draw(generators, *indices_EB.shape).to(device)
        batches = send(indices_EB, device) if is_in_memory else indices_EB
        yield StepDraws(batches, seeds, changes)


class LossMean:
    """The mean of many losses, 0-d each, in memory that does not grow with their number."""

    def __init__(self) -> None:
        self.count = 0
        self._last: list[Tensor] = []
        self._sum: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """Adds the loss of a step; its memory must not be written again."""
        self.count += 1
        self._last.append(loss)
        if len(self._last) == _LOSSES:
            self._sum = self._total()
            self._last.clear()

    def mean(self) -> Tensor:
        """Returns the mean, 0-d float64."""
        return self._total() / self.count

    def _total(self) -> Tensor:
        last = torch.stack(self._last).double().sum() if self._last else None
        parts = [each for each in (self._sum, last) if each is not None]
        return torch.stack(parts).sum()


class LocalRun:
    """The steps of one client in one round, taken one at a time; they train ``model`` in place.

    The optimizer is new in each run, so that none of its state survives a round.
    """

    def __init__(
        self,
        model: nn.Module,
        client: Client,
        context: RoundContext,
        config: Config,
        loss: Loss,
        ranks: ClientRanks = ALONE,
    ) -> None:
        self.model, self.client, self.loss_function = model, client, loss
        self.losses = LossMean()
        """The losses of the steps taken until now."""
        set_training_mode(model, context.plan)
        sampler = BatchSampler.of(config)
        self.steps = sampler.steps_of(len(client.samples))
        """The local steps of the client, E."""
        self._ranks, size = ranks, sampler.size_of(len(client.samples))
        self._part, self.share = ranks.part.of(size), ranks.part.share(size)
        """Which samples of each batch this rank takes, and the share of the batch that they are."""
        self._gradients = ranks.gradients(model, self.share)
        self._layers = context.plan.layers
        self.first_gradients = context.first_gradients
        self._round, self._draws = context.number, _drawn(client, context.number, config)
        self._drawn_before, self._drawn = 0, StepDraws()
        is_segmentation = config.task.name is TaskName.segmentation
        self._mask_border = (config.task.ignore_index or 0) if is_segmentation else None
        settings = OptimizerSettings.of(config.optimizer, context.learning_rate, model)
        self.optimizer = ClientOptimizer(trained_parameters(model), settings)
        self.proximal = ProximalTerm(list(model.parameters()), config.client.proximal_mu)
        self._normalisation = local_normalisation(model, context.plan)

    def loss(self, eager: bool = False) -> Tensor:
        """Clears the gradients and returns the loss F_k of the next step's batch, 0-d."""
        self.optimizer.zero_grad()
        batch = self.next_batch()
        self.seed_layers()
        return self.loss_function(self.model, batch, eager)

    def seed_layers(self) -> None:
        """Seeds the network's random draws in the next step by (seed, client, round, step)."""
        drawn, row = self._of_next_step()
        global_random.seed(drawn.layer_seeds[row], self.client.samples.device)

    def next_batch(self) -> Samples:
        """Returns the samples of the next step, augmented."""
        drawn, row = self._of_next_step()
        draw = Draw(self.client.number, self._round, self.losses.count)
        batch = self.client.samples.batch(draw, drawn.batches_EB[row, self._part])
        if drawn.augmentation is None:
            return batch
        change, labels = partial(drawn.augmentation.apply, row, part=self._part), batch.labels
        inputs = change(batch.inputs)
        if self._mask_border is not None:  # masks are cut as their images are
            labels = change(labels.unsqueeze(1), value=self._mask_border).squeeze(1)
        return Samples(inputs, labels)

    def _of_next_step(self) -> tuple[StepDraws, int]:
        """Returns the draws that have the next step, and its row in them."""
        while self.losses.count >= self._drawn_before + len(self._drawn.layer_seeds):
            self._drawn_before += len(self._drawn.layer_seeds)
            self._drawn = next(self._draws)
        return self._drawn, self.losses.count - self._drawn_before

    def statistics(self) -> AbstractContextManager[None]:
        """Returns the context of a synchronised step for BN layers that are local in it."""
        return self._ranks.statistics(self.model, self.share, self._layers)

    def step(self, loss: Tensor, are_averaged: bool = False) -> None:
        """Takes a step along the gradients that the backward pass of ``loss`` has left.

        A parameter without a gradient gets the gradient 0, as it does in a stack of clients.
        Unless they ``are_averaged``, the gradients become those of the client, over all its ranks.
        """
        for value in self.model.parameters():
            if value.grad is None and value.requires_grad:
                value.grad = torch.zeros_like(value)
        if not are_averaged:
            self._gradients.average()
        if self.first_gradients is not None and self.losses.count == 0:
            self.first_gradients.add(self.model, self.client.weight)
        self.proximal.add_to_gradients()
        self.optimizer.step()
        self.losses.add(loss.detach().clone())  # a CUDA graph overwrites its output

    def finish(self) -> Tensor:
        """Takes the remaining steps, each with the client's local statistics.

        Returns this rank's part of the mean loss of all steps of the round, 0-d float64: the ranks
        of the client have the parts of a sum.  Frees the optimizer's state, because a rank may have
        many clients.
        """
        with self._normalisation, self._gradients.overlapped():
            while self.losses.count < self.steps:
                with self._ranks.statistics(self.model, self.share):
                    loss = self.loss()
                    loss.backward()
                self.step(loss)
        self.optimizer.free()
        return self.losses.mean() * self.share


class ProximalTerm:
    """FedProx (Li et al. 2020): adds mu (w - w_0) to each gradient; w_0 are the first values."""

    def __init__(self, values: Sequence[Tensor], mu: float) -> None:
        self._values, self.mu = values, mu
        self._first = [value.detach().clone() for value in values] if mu else []

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        """Adds the term to the values that have a gradient."""
        for value, first in zip(self._values, self._first, strict=False):
            if value.grad is not None:
                value.grad = value.grad.add(value - first, alpha=self.mu)  # a stack may expand it


def set_training_mode(model: nn.Module, plan: RoundPlan | None = None) -> None:
    """Sets training mode, but evaluation mode for BN layers with frozen statistics.

    Without a ``plan`` these are the layers that ``model.freeze`` has frozen.
    """
    model.train()
    for layer in batchnorm_layers(model).values():
        if layer.is_frozen or (plan is not None and plan.normaliser is Normaliser.frozen):
            layer.eval()


def local_normalisation(model: nn.Module, plan: RoundPlan) -> AbstractContextManager[None]:
    """Returns the context of steps that are not synchronised: FBN and HBN keep their statistics."""
    if plan.normaliser is Normaliser.running:
        return fixed_global_statistics(model)
    return nullcontext()
