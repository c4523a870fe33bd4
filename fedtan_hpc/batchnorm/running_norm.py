"""Layers that normalise by the round's global statistics, without a gradient through them.

FBN (Guerraoui et al. 2024) uses them alone; HBN (Chen et al. 2025) mixes them with the batch's.
The running statistics move meanwhile by torch's rule, towards the batch's mean m and its second
moment about the global mean mu, v + (m - mu)^2.  Both are linear in the clients, so that the
ordinary average of the models makes them the server-side moving average of all clients' batch
moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layer import FedTANBatchNorm, batchnorm_layers
from .moments import statistics_dtype


class RunningBatchNorm(FedTANBatchNorm):
    """In a ``held`` context: BN by the statistics of its beginning, while the running ones move."""

    _held: tuple[Tensor, Tensor] | None = None
    """Mean and variance that normalise, (C,) each."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise per channel; returns the shape and dtype of ``x``."""
        if self._held is None or not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        wide = x.to(statistics_dtype(x))
        others = [dim for dim in range(x.dim()) if dim != 1]
        variance_C, mean_C = torch.var_mean(wide, others, correction=0)
        moved = variance_C.detach() + (mean_C.detach() - self._held[0]).square()
        self._update_running_statistics(mean_C.detach(), moved)
        return self._normalised(wide, mean_C, variance_C).to(x.dtype)

    def _normalised(self, x: Tensor, mean_C: Tensor, variance_C: Tensor) -> Tensor:
        """By the held moments; those of the batch do not matter."""
        assert self._held is not None
        mean, variance = (moment.to(x.dtype) for moment in self._held)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)


class HybridBatchNorm(RunningBatchNorm):
    """BN by (1 - a) times the batch's moments plus a times the held ones, a = sigmoid(d).

    The gradient runs through the batch's moments and d, which is the parameter ``mix``, (C,).
    """

    mix: nn.Parameter

    def _normalised(self, x: Tensor, mean_C: Tensor, variance_C: Tensor) -> Tensor:
        assert self._held is not None
        a_C = torch.sigmoid(self.mix).to(x.dtype)
        held_mean, held_variance = (moment.to(x.dtype) for moment in self._held)
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean = torch.lerp(mean_C, held_mean, a_C).view(shape)
        variance = torch.lerp(variance_C, held_variance, a_C).view(shape)
        y = (x - mean) * torch.rsqrt(variance + self.eps)
        if self.weight is None:
            return y
        y = y * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)


def normalise_by_running(module: nn.Module, mixes: bool) -> nn.Module:
    """Turn the FedTAN layers of ``module`` into FBN layers, or HBN layers with d = 0, half each.

    Raises ``ValueError`` for layers that keep no running statistics.
    """
    for name, layer in batchnorm_layers(module).items():
        if layer.running_mean is None:
            raise ValueError(f"layer {name} keeps no running statistics to normalise by")
        layer.__class__ = HybridBatchNorm if mixes else RunningBatchNorm
        if mixes:
            cast(HybridBatchNorm, layer).mix = nn.Parameter(torch.zeros(layer.num_features))
    return module


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Let the FBN and HBN layers of ``module`` normalise by their present statistics."""
    layers = [layer for layer in module.modules() if isinstance(layer, RunningBatchNorm)]
    for layer in layers:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer._held = layer.running_mean.clone(), layer.running_var.clone()
    try:
        yield
    finally:
        for layer in layers:
            layer._held = None
