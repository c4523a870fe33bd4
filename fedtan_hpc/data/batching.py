"""Samples, and the batches that a client draws from them in a round.  Used by ``training``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config.enums import SamplingName
from ..runtime import random_streams


@dataclass(frozen=True)
class Samples:
    """Inputs (N, C, H, W) in a floating-point type and labels (N,) in int64, on one device."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor | slice) -> Samples:
        return Samples(self.inputs[indices], self.labels[indices])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Samples:
        """Copies the samples to ``device`` and converts the inputs to ``dtype``, if it is given."""
        return Samples(self.inputs.to(device, dtype), self.labels.to(device))


@dataclass(frozen=True)
class BatchSampler:
    """Draws a client's batches of a round: E = ``steps`` batches of B samples each.

    shuffled: the client goes through its samples in random order and starts a new order when fewer
    than B are left; B = min(batch_size, samples).  replacement: each index is drawn independently
    and B = batch_size, as in the authors' code (github wangyanmeng/FedTAN).
    """

    batch_size: int
    steps: int
    seed: int
    sampling: SamplingName = SamplingName.shuffled

    def draw(self, samples: int, client: int, round_number: int) -> Tensor:
        """Returns indices (E, B), 0 to ``samples`` - 1; they depend on seed, client and round."""
        key = self.seed, client, round_number
        if self.sampling is SamplingName.replacement:
            rng = random_streams.generator(random_streams.REPLACEMENT, *key)
            return torch.from_numpy(rng.integers(samples, size=(self.steps, self.batch_size)))
        size = min(self.batch_size, samples)
        per_pass = samples // size
        passes = -(-self.steps // per_pass)
        rng = random_streams.generator(random_streams.BATCHES, *key)
        orders = [rng.permutation(samples)[: per_pass * size] for _ in range(passes)]
        return torch.from_numpy(np.concatenate(orders).reshape(-1, size)[: self.steps])
