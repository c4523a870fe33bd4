"""FBN's and HBN's layers: normalisation by the round's global statistics, without their gradient.

FBN (Guerraoui et al. 2024) uses the global statistics alone; HBN (Chen et al. 2025) mixes them with
those of the batch.  The running statistics move by torch's rule towards the batch's mean m and its
second moment about the global mean mu, v + (m - mu)^2.  Both are linear in the clients, so that the
ordinary average of the models makes them the server-side moving average of all clients' batch
moments.  ``job.setup`` converts the layers; ``training`` opens the context.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .conversion import batchnorm_layers, fedtan_class
from .layer import FedTANBatchNorm
from .local_kernels import statistics_dtype


class RunningBatchNorm(FedTANBatchNorm):
    """FBN: in ``fixed_global_statistics`` BN by the running statistics at the context's start."""

    _fixed: tuple[Tensor, Tensor] | None = None
    """Mean and variance to normalise by, (C,) each."""

    def normalise(self, x: Tensor) -> Tensor:
        """Normalises per channel; returns the shape and dtype of ``x``."""
        if self._fixed is None or not self.training:
            return super().normalise(x)
        self._check_input_dim(x)
        wide = x.to(statistics_dtype(x))
        others = [dim for dim in range(x.dim()) if dim != 1]
        variance_C, mean_C = torch.var_mean(wide, others, correction=0)
        second_C = variance_C.detach() + (mean_C.detach() - self._fixed[0]).square()
        self._move_running_statistics(mean_C.detach(), second_C)
        return self._normalise_by(wide, mean_C, variance_C).to(x.dtype)

    @torch.no_grad()
    def _move_running_statistics(self, mean_C: Tensor, second_C: Tensor) -> None:
        """Moves the buffers by torch's rule; the compiler takes it into the graph of the step."""
        tracked = self._tracked()
        if tracked is None:
            return
        if tracked.counter is not None:
            tracked.counter.add_(1)
        factor = tracked.factor()
        for buffer, target in ((tracked.mean, mean_C), (tracked.variance, second_C)):
            if buffer is not None and factor:
                buffer.lerp_(target.to(buffer.dtype), factor)

    def _normalise_by(self, x: Tensor, mean_C: Tensor, variance_C: Tensor) -> Tensor:
        mean, variance = self._fixed_moments(x)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)

    def _fixed_moments(self, x: Tensor) -> list[Tensor]:
        assert self._fixed is not None
        return [moment.to(x.dtype) for moment in self._fixed]


class HybridBatchNorm(RunningBatchNorm):
    """HBN: BN by (1 - a) times the batch's moments plus a times the fixed ones, a = sigmoid(d).

    The gradient runs through the batch's moments and d, which is the parameter ``mix``, (C,).
    """

    mix: nn.Parameter

    def _normalise_by(self, x: Tensor, mean_C: Tensor, variance_C: Tensor) -> Tensor:
        fixed_mean, fixed_variance = self._fixed_moments(x)
        a_C = torch.sigmoid(self.mix).to(x.dtype)
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean = torch.lerp(mean_C, fixed_mean, a_C).view(shape)
        variance = torch.lerp(variance_C, fixed_variance, a_C).view(shape)
        y = (x - mean) * torch.rsqrt(variance + self.eps)
        if self.weight is None:
            return y
        y = y * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)


def normalise_by_running(module: nn.Module, mixes: bool) -> nn.Module:
    """Turns the FedTAN layers of ``module`` into FBN layers, or HBN layers with d = 0, half each.

    Raises ``ValueError`` for layers that keep no running statistics.
    """
    for name, layer in batchnorm_layers(module).items():
        if layer.running_mean is None:
            raise ValueError(f"layer {name} keeps no running statistics to normalise by")
        base: type[RunningBatchNorm] = HybridBatchNorm if mixes else RunningBatchNorm
        former, then = layer.former_class, vars(type(layer)).get("_then")
        layer.__class__ = base if former is None else fedtan_class(base, former, then)
        if mixes:
            cast(HybridBatchNorm, layer).mix = nn.Parameter(torch.zeros(layer.num_features))
    return module


@contextmanager
def fixed_global_statistics(module: nn.Module) -> Iterator[None]:
    """Lets the FBN and HBN layers of ``module`` normalise by their present running statistics."""
    layers = [layer for layer in module.modules() if isinstance(layer, RunningBatchNorm)]
    for layer in layers:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer._fixed = layer.running_mean.clone(), layer.running_var.clone()
    try:
        yield
    finally:
        for layer in layers:
            layer._fixed = None
