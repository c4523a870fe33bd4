"""Clients of a rank that train as one stack: one set of kernels for all, by ``torch.func.vmap``.

Every parameter has the clients as one more dimension.  Batches of unequal sizes are padded with
their first sample, for which every loss is defined; padding counts neither in the loss nor in the
statistics, and no gradient comes from it.
Layers that draw at random (dropout) draw for the whole stack: only there a client's steps depend on
which clients are stacked with it.  ``client_runners`` uses it, and ``vmap_trial`` tries it.

Shapes: K clients, N samples of the largest batch, C channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_map

from ...batchnorm.context import chosen_layers, model_tag, normalised_by
from ...batchnorm.conversion import batchnorm_layers
from ...batchnorm.layer import FedTANBatchNorm
from ...batchnorm.local_statistics import (
    LocalStatistics,
    PartlyGlobal,
    RunningStatistics,
    move_stacks,
)
from ...batchnorm.statistics_call import BatchNormContext, GlobalStatistics
from ...models.outputs import arguments
from ...runtime.transfer import constant, copy_all
from ..local_step import LocalRun, ProximalTerm
from ..optimizers import ClientOptimizer, trained_parameters
from ..pooled_gradients import mean_over_ranks

Gradients = dict[str, Tensor]
"""The clients' gradients, (K, ...) each, by parameter name."""


@dataclass(frozen=True)
class PaddedBatch:
    """The batches of K clients in one step: inputs and labels (K, N, ...), mask (K, N)."""

    inputs: Any
    labels: Tensor
    mask: Tensor | None
    """Which samples are real; None if all batches have one size."""
    sizes: Sequence[int]

    def chunk(self, clients: slice) -> PaddedBatch:
        """Returns the batches of some of the clients."""
        mask = None if self.mask is None else self.mask[clients]
        inputs = tree_map(lambda values: values[clients], self.inputs)
        return PaddedBatch(inputs, self.labels[clients], mask, self.sizes[clients])


class Stack:
    """The clients of ``runs``, which begin with the values of ``model``.

    Each run gives batches and the optimizer's settings.  ``extract_client`` moves a client's values
    and optimizer state into its run.  The runs may share a model if they are extracted one by one.
    """

    _statistics_class = GlobalStatistics

    def __init__(self, model: nn.Module, runs: Sequence[LocalRun]) -> None:
        self._model = model
        self._names = _names(model)
        self._runs = runs
        clients, plain = len(runs), torch.contiguous_format  # vmap is slow with channels last
        self._values = {
            name: value.detach().expand(clients, *value.shape).clone(memory_format=plain)
            for name, value in trained_parameters(model).items()
        }
        first = runs[0].optimizer
        self._optimizer = ClientOptimizer(self._values, first.settings, stacked=True)
        self._optimizer.load(first.state())
        self._proximal: ProximalTerm | None = None
        layers = batchnorm_layers(model).values()
        self._running = [RunningStatistics(layer, clients) for layer in layers]

    @torch.no_grad()
    def load_client(self, client_index: int, module: nn.Module) -> None:
        """Replaces a client's initial values by those of ``module``."""
        for name, parameter in trained_parameters(module).items():
            self._values[name][client_index] = parameter
        layers = batchnorm_layers(module).values()
        for running, layer in zip(self._running, layers, strict=True):
            running.copy_from(layer, client_index)

    def synchronised_step(self, pooled: bool = False, names: Collection[str] | None = None) -> None:
        """Takes a step with global statistics in the BN layers of ``names``, or in all.

        With ``pooled`` it follows the mean of all gradients.
        """
        batch, layers = self._next_batch(), batchnorm_layers(self._model)
        chosen = chosen_layers(self._model, names)
        running = dict(zip(layers, self._running, strict=True))
        statistics = self._statistics_class(
            weights=[run.client.weight for run in self._runs],
            group=None,
            layers=list(chosen),
            model_tag=self._tag_of(chosen),
            mask_KN=batch.mask,
            sizes=batch.sizes,
            move=move_stacks,
            owners=[running[name] for name in chosen],
            is_stacked=True,
        )
        context: BatchNormContext = statistics
        if len(chosen) < len(layers):
            own = LocalStatistics(self._running, slice(None), batch.mask, batch.sizes)
            context = PartlyGlobal(statistics, own, list(layers), list(chosen))
        with normalised_by(self._model, context):
            gradients, losses = self._gradients(self._values, batch)
            statistics.close()
        if pooled:
            self._pool(gradients)
        self._step([(gradients, losses)])

    def _tag_of(self, layers: Mapping[str, FedTANBatchNorm]) -> int:
        return model_tag(layers, are_copies=True)

    def local_step(self, max_stacked: int) -> None:
        """Takes a step with local statistics, in passes of at most ``max_stacked`` clients."""
        batch, passes = self._next_batch(), []
        for start in range(0, len(self._runs), max_stacked):
            clients = slice(start, start + max_stacked)
            chunk = batch.chunk(clients)
            statistics = LocalStatistics(self._running, clients, chunk.mask, chunk.sizes)
            values = {name: value[clients] for name, value in self._values.items()}
            with normalised_by(self._model, statistics):
                passes.append(self._gradients(values, chunk))
        self._step(passes)

    @torch.no_grad()
    def extract_client(self, client_index: int) -> LocalRun:
        """Copies a client's parameters, statistics and optimizer state into its run; returns it."""
        run = self._runs[client_index]
        trained = trained_parameters(run.model)
        copy_all(trained.values(), (self._values[name][client_index] for name in trained))
        run.optimizer.load(self._optimizer.state_of(client_index))
        layers = batchnorm_layers(run.model).values()
        for running, layer in zip(self._running, layers, strict=True):
            running.copy_to(layer, client_index)
        return run

    def _next_batch(self) -> PaddedBatch:
        batches = [run.next_batch() for run in self._runs]
        sizes = [len(batch) for batch in batches]
        inputs = tree_map(_padded, *(batch.inputs for batch in batches))
        labels = _padded(*(batch.labels for batch in batches))
        mask = None
        if min(sizes) < max(sizes):
            positions = torch.arange(max(sizes), device=labels.device)
            mask = positions < constant(tuple(sizes), torch.int64, labels.device).unsqueeze(1)
        return PaddedBatch(inputs, labels, mask, sizes)

    def _gradients(
        self, stacked: dict[str, Tensor], batch: PaddedBatch
    ) -> tuple[Gradients, Tensor]:
        """Returns the clients' gradients and losses (K,) for ``stacked`` values (K, ...)."""
        mask = batch.mask
        if mask is None:
            mask = torch.ones(batch.labels.shape[:2], dtype=torch.bool, device=batch.labels.device)
        self._runs[0].seed_layers()
        loss_function = self._runs[0].loss_function

        def loss(values: dict[str, Tensor], x: Any, y: Tensor, is_real: Tensor) -> Tensor:
            named = {name: values[first] for name, first in self._names.items()}
            output = functional_call(self._model, named, *arguments(x), tie_weights=False)
            losses = loss_function.objective.losses(output, y)
            return (losses * is_real).sum() / is_real.sum()

        step = vmap(grad_and_value(loss), randomness="different")
        with loss_function.precision(batch.labels.device):
            gradients, losses = step(stacked, batch.inputs, batch.labels, mask)
        return gradients, losses

    def _pool(self, gradients: Gradients) -> None:
        """Sets all clients' gradients to sum_k p_k g_k over the stack and all ranks."""
        weights = [run.client.weight for run in self._runs]
        like = next(iter(gradients.values()))
        p_K = constant(tuple(weights), like.dtype, like.device)
        means = [torch.tensordot(p_K, value, dims=1) for value in gradients.values()]
        mean_over_ranks(means)
        for name, mean in zip(gradients, means, strict=True):
            gradients[name] = mean.expand_as(gradients[name]).clone()

    def _step(self, passes: Sequence[tuple[Gradients, Tensor]]) -> None:
        for name, value in self._values.items():
            chunks = [gradients[name] for gradients, _ in passes]
            value.grad = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        if self._proximal is None:  # the first step: all clients are loaded
            self._note_gradients()
            self._proximal = ProximalTerm(list(self._values.values()), self._runs[0].proximal.mu)
        self._proximal.add_to_gradients()
        self._optimizer.step()
        self._optimizer.zero_grad()
        losses = torch.cat([losses for _, losses in passes])
        for run, loss in zip(self._runs, losses.detach(), strict=True):
            run.losses.add(loss)

    def _note_gradients(self) -> None:
        """Hands the gradients of the first step to the probe, if there is one."""
        if (sums := self._runs[0].first_gradients) is not None:
            stacked = self._values.items()
            gradients = {name: value.grad for name, value in stacked if value.grad is not None}
            sums.add_stack(gradients, [run.client.weight for run in self._runs])


def _padded(*batches: Tensor) -> Tensor:
    """Returns the batches as one tensor (K, N, ...); short ones repeat their first sample."""
    size = max(map(len, batches))
    return torch.stack([torch.cat([b, b[:1].expand(size - len(b), *b.shape[1:])]) for b in batches])


def _names(module: nn.Module) -> dict[str, str]:
    """Returns the name in ``trained_parameters`` of each parameter, by all its names in layers.

    Several layers may share a parameter.  A layer that is used twice has one name: torch would put
    its parameters back in the wrong order otherwise.
    """
    first = {id(value): name for name, value in trained_parameters(module).items()}
    return {
        name: first[id(value)]
        for path, layer in module.named_modules()
        for name, value in layer.named_parameters(path, recurse=False, remove_duplicate=False)
        if id(value) in first
    }
