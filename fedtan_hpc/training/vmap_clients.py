"""Clients of a rank that train at once: one set of kernels for all, by ``torch.func.vmap``.

Every parameter has one more dimension, the clients'.  Batches of unequal sizes are padded with
zeros; padding counts neither in the loss nor in the statistics, and nothing flows back from it.
Layers that draw at random (dropout) draw for the whole stack: there, and only there, a client's
steps depend on who is stacked with it.

Shapes: K clients, N samples of the largest batch, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

from ..batchnorm.context import normalised_by
from ..batchnorm.layer import batchnorm_layers
from ..batchnorm.local_statistics import LocalStatistics, RunningStatistics
from ..batchnorm.statistics_call import GlobalStatistics
from ..runtime.transfer import constant, copy_all
from . import sgd
from .local_training import LocalRun, ProximalTerm
from .pooled_gradients import mean_over_ranks

_PLAIN = torch.contiguous_format
"""Of a stack's parameters: vmap has no quick way for images that are channels last."""


@dataclass(frozen=True)
class PaddedBatch:
    """The batches of a step side by side: inputs (K, N, ...), labels and mask (K, N)."""

    inputs: Tensor
    labels: Tensor
    mask: Tensor | None
    """None if all batches are of one size."""
    sizes: Sequence[int]

    def part(self, lanes: slice) -> PaddedBatch:
        """Some of the clients."""
        mask = None if self.mask is None else self.mask[lanes]
        return PaddedBatch(self.inputs[lanes], self.labels[lanes], mask, self.sizes[lanes])


class Stack:
    """The clients of ``runs`` from the values of one model; each run gives batches and optimizer.

    Steps train the stack.  ``leave`` moves a client's values and momentum to its run, which goes
    on by itself.  The runs may share one model, if they leave one after another.
    """

    def __init__(self, model: nn.Module, runs: Sequence[LocalRun]) -> None:
        self._model = model
        self._runs = runs
        clients = len(runs)
        self._values = {
            name: value.detach().expand(clients, *value.shape).clone(memory_format=_PLAIN)
            for name, value in _trained(model)
        }
        self._optimizer = _optimizer_like(runs[0], self._values)
        self._pull: ProximalTerm | None = None
        layers = batchnorm_layers(model).values()
        self._running = [RunningStatistics(layer, clients) for layer in layers]

    @torch.no_grad()
    def enter(self, client_index: int, module: nn.Module) -> None:
        """Let a client begin with the values of ``module`` in place of the common ones."""
        for name, parameter in _trained(module):
            self._values[name][client_index] = parameter
        layers = batchnorm_layers(module).values()
        for running, layer in zip(self._running, layers, strict=True):
            running.copy_from(layer, client_index)

    def synchronised_step(self, pooled: bool = False) -> None:
        """A step of all clients with global statistics, and with their mean gradient if pooled."""
        batch = self._next_batch()
        federation = GlobalStatistics(
            weights=[run.client.weight for run in self._runs],
            group=None,
            layers=list(batchnorm_layers(self._model)),
            mask_KN=batch.mask,
            sizes=batch.sizes,
            updates=[running.move for running in self._running],
            is_stacked=True,
        )
        with normalised_by(self._model, federation):
            gradients, losses = self._gradients(self._values, batch)
            federation.close()
        if pooled:
            self._pool(gradients)
        self._step([(gradients, losses)])

    def local_step(self, at_once: int) -> None:
        """A step of all clients by themselves, ``at_once`` of them at a time."""
        batch, found = self._next_batch(), []
        for start in range(0, len(self._runs), at_once):
            lanes = slice(start, start + at_once)
            part = batch.part(lanes)
            context = LocalStatistics(self._running, lanes, part.mask, part.sizes)
            values = {name: value[lanes] for name, value in self._values.items()}
            with normalised_by(self._model, context):
                found.append(self._gradients(values, part))
        self._step(found)

    @torch.no_grad()
    def leave(self, client_index: int) -> LocalRun:
        """Give a run its client's parameters, running statistics and momentum; return the run."""
        run = self._runs[client_index]
        trained = dict(_trained(run.model))
        copy_all(trained.values(), (self._values[name][client_index] for name in trained))
        for name, parameter in trained.items():
            stacked = self._values[name]
            momentum = self._optimizer.state[stacked].get("momentum_buffer")
            if momentum is not None:
                run.optimizer.state[parameter]["momentum_buffer"] = momentum[client_index].clone()
        layers = batchnorm_layers(run.model).values()
        for running, layer in zip(self._running, layers, strict=True):
            running.copy_to(layer, client_index)
        return run

    def _next_batch(self) -> PaddedBatch:
        batches = [run.next_batch() for run in self._runs]
        sizes = [len(batch) for batch in batches]
        inputs = nn.utils.rnn.pad_sequence([batch.inputs for batch in batches], batch_first=True)
        labels = nn.utils.rnn.pad_sequence([batch.labels for batch in batches], batch_first=True)
        mask = None
        if min(sizes) < max(sizes):
            place = torch.arange(max(sizes), device=labels.device)
            mask = place < constant(tuple(sizes), torch.int64, labels.device).unsqueeze(1)
        return PaddedBatch(inputs, labels, mask, sizes)

    def _gradients(
        self, values: dict[str, Tensor], batch: PaddedBatch
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Each client's gradient (K, ...) by name, and the losses (K,)."""
        mask = torch.ones_like(batch.labels) if batch.mask is None else batch.mask
        self._runs[0].seed_layers()

        def loss(own: dict[str, Tensor], x: Tensor, y: Tensor, real: Tensor) -> Tensor:
            scores = functional_call(self._model, own, (x,))
            return (cross_entropy(scores, y, reduction="none") * real).sum() / real.sum()

        step = vmap(grad_and_value(loss), randomness="different")
        with self._runs[0].loss_function.precision(batch.inputs.device):
            gradients, losses = step(values, batch.inputs, batch.labels, mask)
        return gradients, losses

    def _pool(self, gradients: dict[str, Tensor]) -> None:
        """Give all clients sum_k p_k g_k over the stack and all ranks."""
        weights = [run.client.weight for run in self._runs]
        like = next(iter(gradients.values()))
        p_K = constant(tuple(weights), like.dtype, like.device)
        means = [torch.tensordot(p_K, value, dims=1) for value in gradients.values()]
        mean_over_ranks(means)
        for name, mean in zip(gradients, means, strict=True):
            gradients[name] = mean.expand_as(gradients[name]).clone()

    def _step(self, found: Sequence[tuple[dict[str, Tensor], Tensor]]) -> None:
        for name, value in self._values.items():
            parts = [gradients[name] for gradients, _ in found]
            value.grad = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self._pull is None:  # nothing has moved yet
            self._pull = ProximalTerm(list(self._values.values()), self._runs[0].pull.mu)
        self._pull.add_to_gradients()
        sgd.step(self._optimizer)
        self._optimizer.zero_grad()
        losses = torch.cat([losses for _, losses in found])
        for run, loss in zip(self._runs, losses.detach(), strict=True):
            run.losses.append(loss)


def vmap_error(model: nn.Module, sample: Tensor) -> Exception | None:
    """What goes wrong when two clients of ``model`` are stacked, on copies of ``sample`` (1, ...).

    Networks that change buffers of their own in forward cannot be, nor such as branch on values.
    """
    copied = copy.deepcopy(model).train()
    running = [RunningStatistics(layer, 2) for layer in batchnorm_layers(copied).values()]
    values = {name: value.detach().expand(2, *value.shape) for name, value in _trained(copied)}
    inputs = sample.expand(2, 2, *sample.shape[1:])
    scores = vmap(partial(functional_call, copied), randomness="different")
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng([sample.device] if sample.is_cuda else []),
            normalised_by(copied, LocalStatistics(running, slice(None), None, (2, 2))),
        ):
            scores(values, (inputs,))
    except Exception as error:  # whatever a network of the user's may raise
        return error
    return None


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that training changes, by name; all clients share the others."""
    return ((name, value) for name, value in module.named_parameters() if value.requires_grad)


def _optimizer_like(run: LocalRun, values: dict[str, Tensor]) -> torch.optim.SGD:
    """SGD with the settings and the momentum of ``run``, for a stack of such clients."""
    group = run.optimizer.param_groups[0]
    optimizer = sgd.sgd(values.values(), group["lr"], group["momentum"], group["weight_decay"])
    for name, parameter in _trained(run.model):
        momentum = run.optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            stacked = momentum.expand_as(values[name]).clone()
            optimizer.state[values[name]]["momentum_buffer"] = stacked
    return optimizer
