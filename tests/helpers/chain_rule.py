"""Gradients of an mlp with BN by a chain rule that is written out, client by client, in float64.

Nothing of the package's arithmetic is used: moments, derivatives by moments, and their averages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedtan_hpc.data.batching import Samples


@dataclass
class Pass:
    """A forward pass of all clients; ``gradients`` goes back through it."""

    model: nn.Sequential
    batches: Sequence[Samples]
    weights: Sequence[float]
    forward_is_global: bool | Collection[int]
    """In all BN layers or none, or in those with these indices in the model."""
    saved: list[tuple[list[Tensor], ...]] = field(default_factory=list)

    def mean(self, values: Sequence[Tensor]) -> Tensor:
        """sum_k p_k v_k"""
        return torch.stack([p * v for p, v in zip(self.weights, values, strict=True)]).sum(0)

    def loss(self) -> float:
        """sum_k p_k F_k, the mean cross-entropy of each batch."""
        xs = [batch.inputs for batch in self.batches]
        self.saved = []
        for index, layer in enumerate(self.model):
            means: list[Tensor] = []
            variances: list[Tensor] = []
            if isinstance(layer, nn.BatchNorm1d):
                means, variances = self._moments(xs, _is_in(index, self.forward_is_global))
            self.saved.append((xs, means, variances))
            xs = [self._forward(layer, *each) for each in _by_client(xs, means, variances)]
        self.outputs = xs
        each = [
            nn.functional.cross_entropy(x, batch.labels)
            for x, batch in zip(xs, self.batches, strict=True)
        ]
        return float(self.mean(each))

    def _moments(self, xs: Sequence[Tensor], are_global: bool) -> tuple[list[Tensor], list[Tensor]]:
        means = [x.mean(0) for x in xs]
        if not are_global:
            return means, [(x - m).square().mean(0) for x, m in zip(xs, means, strict=True)]
        mean = self.mean(means)
        variance = self.mean([(x - mean).square().mean(0) for x in xs])
        return [mean] * len(xs), [variance] * len(xs)

    def _forward(self, layer: nn.Module, x: Tensor, *moments: Tensor) -> Tensor:
        if not moments:
            return layer(x)  # type: ignore[no-any-return]
        assert isinstance(layer, nn.BatchNorm1d)
        mean, variance = moments
        return layer.weight * (x - mean) / (variance + layer.eps).sqrt() + layer.bias

    def gradients(self, backward_is_global: bool | Collection[int]) -> dict[str, Tensor]:
        """sum_k p_k g_k by parameter name, g_k of client k's own chain rule."""
        self.loss()
        found: dict[str, Tensor] = {}
        gs = [
            (torch.softmax(x, 1) - nn.functional.one_hot(b.labels, x.size(1))) / len(x)
            for x, b in zip(self.outputs, self.batches, strict=True)
        ]
        for index in reversed(range(len(self.model))):
            layer, (xs, means, variances) = self.model[index], self.saved[index]
            if isinstance(layer, nn.Linear):
                found[f"{index}.weight"] = self.mean([g.T @ x for g, x in _pairs(gs, xs)])
                found[f"{index}.bias"] = self.mean([g.sum(0) for g in gs])
                gs = [g @ layer.weight for g in gs]
            elif isinstance(layer, nn.ReLU):
                gs = [g * (x > 0) for g, x in _pairs(gs, xs)]
            elif isinstance(layer, nn.BatchNorm1d):
                rs = [(v + layer.eps) ** -0.5 for v in variances]
                centred = [x - m for x, m in _pairs(xs, means)]
                pairs = zip(gs, centred, rs, strict=True)
                found[f"{index}.weight"] = self.mean([(g * c * r).sum(0) for g, c, r in pairs])
                found[f"{index}.bias"] = self.mean([g.sum(0) for g in gs])
                are_global = _is_in(index, backward_is_global)
                gs = self._through_moments(layer, gs, centred, rs, are_global)
        return found

    def _through_moments(
        self,
        layer: nn.BatchNorm1d,
        gs: Sequence[Tensor],
        centred: Sequence[Tensor],
        rs: Sequence[Tensor],
        backward_is_global: bool,
    ) -> list[Tensor]:
        gamma = layer.weight
        by_mean = [-(r * gamma) * g.sum(0) for g, r in _pairs(gs, rs)]
        by_variance = [
            -0.5 * r**3 * gamma * (g * c).sum(0) for g, c, r in zip(gs, centred, rs, strict=True)
        ]
        if backward_is_global:
            by_mean = [self.mean(by_mean)] * len(gs)
            by_variance = [self.mean(by_variance)] * len(gs)
        return [
            r * gamma * g + (d_mean + 2 * c * d_variance) / len(g)
            for g, c, r, d_mean, d_variance in zip(
                gs, centred, rs, by_mean, by_variance, strict=True
            )
        ]


def _is_in(index: int, where: bool | Collection[int]) -> bool:
    return where if isinstance(where, bool) else index in where


def _pairs(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(a, b, strict=True))


def _by_client(xs: Sequence[Tensor], *moments: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    used = [each for each in moments if each]
    return list(zip(xs, *used, strict=True))
