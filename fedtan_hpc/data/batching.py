"""Samples, data sets, and the batches that a client draws in a round.  Used by ``training``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from ..config.enums import SamplingName
from ..config.schema import Config
from ..runtime import random_streams
from .partition import Indices

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]

_EVALUATION_VALUES = 2**22
"""Most input values of an evaluation batch."""
_EVALUATION_BATCH = 1024
"""Most samples of an evaluation batch."""
_DRAWN = 2**20
"""Most indices of samples that are drawn at once, if a pass has no more."""
_SCORES = 16
"""Scores that are allowed for each target value in evaluation."""


class Draw(NamedTuple):
    """Where in training a batch is drawn; random transforms of its samples follow from it."""

    client: int
    round: int
    step: int


@dataclass(frozen=True)
class Part:
    """The part of each batch that one of the ranks of a client takes."""

    member: int = 0
    members: int = 1

    def of(self, samples: int) -> slice:
        """Returns the positions of the part in a batch; the first one if the part is empty."""
        begin, end = self._ends(samples)
        return slice(begin, end) if end > begin else slice(0, 1)

    def share(self, samples: int) -> float:
        """Returns the size of the part over that of the batch."""
        begin, end = self._ends(samples)
        return (end - begin) / samples

    def _ends(self, samples: int) -> tuple[int, int]:
        begin, end = samples * self.member, samples * (self.member + 1)
        return begin // self.members, end // self.members


WHOLE = Part()
"""The part of a rank that holds clients by itself."""


@dataclass(frozen=True)
class Samples:
    """Inputs in a floating-point type and labels on one device.

    Inputs are a tensor (N, ...), such as images (N, C, H, W), or a dict or tuple of such tensors.
    Labels are class numbers (N,) in int64, or the targets of another task, (N, ...).
    """

    inputs: Any
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor | slice) -> Samples:
        return self.map_inputs(lambda values: values[indices], self.labels[indices])

    @property
    def device(self) -> torch.device:
        """The device of the samples."""
        return self.labels.device

    def map_inputs(
        self, function: Callable[[Tensor], Tensor], labels: Tensor | None = None
    ) -> Samples:
        """Returns samples with ``function`` of each tensor of the inputs, and other ``labels``."""
        return Samples(tree_map(function, self.inputs), self.labels if labels is None else labels)

    def batch(self, draw: Draw, indices: Tensor) -> Samples:
        """Returns the samples at ``indices``; does not depend on where they are drawn."""
        return self[indices]

    def apart(self) -> Samples:
        """Returns the samples themselves: nothing is read ahead."""
        return self

    def evaluation_batch_size(self) -> int:
        """Returns how many such samples are evaluated at once."""
        leaves, _ = tree_flatten(self.inputs)
        values: int = sum(leaf[0].numel() for leaf in leaves if len(leaf))
        if self.labels.dim() > 1 and len(self):  # a network's output has scores for each of them
            values = max(values, _SCORES * self.labels[0].numel())
        return max(1, min(_EVALUATION_BATCH, _EVALUATION_VALUES // max(1, values)))

    def evaluation_batches(self) -> Iterator[Samples]:
        """Returns the samples in batches for evaluation, in their order."""
        size = self.evaluation_batch_size()
        return (self[start : start + size] for start in range(0, len(self), size))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Samples:
        """Copies the samples to ``device``; converts floating-point values to ``dtype``."""

        def sent(values: Tensor) -> Tensor:
            wide = dtype if values.is_floating_point() else None
            return values.to(device, wide, non_blocking=values.is_pinned())

        return self.map_inputs(sent, sent(self.labels))


class ClientSamples(Protocol):
    """The samples of a client, in memory or read batch by batch."""

    def __len__(self) -> int:
        """Returns the number of samples."""

    @property
    def device(self) -> torch.device:
        """The device of the batches."""

    def batch(self, draw: Draw, indices: Tensor) -> Samples:
        """Returns the samples at ``indices``, 0 to N - 1, for the step of ``draw``."""

    def apart(self) -> ClientSamples:
        """Returns samples with the same batches, which take none that training has read ahead."""


class Moments(NamedTuple):
    """Inputs are (value - mean) / deviation, by channel; pixels of bytes are 0 to 255."""

    mean: list[float]
    deviation: list[float]

    @classmethod
    def of(cls, mean_C11: FloatArray, deviation_C11: FloatArray) -> Moments:
        """Returns arrays of any shape as lists."""
        return cls(mean_C11.ravel().tolist(), deviation_C11.ravel().tolist())


class KeptItems(Protocol):
    """Samples in the memory of the host, as they are before random transforms."""

    def keep(self, indices: Indices) -> None:
        """Reads samples that then stay in memory."""

    def drop(self, indices: Indices) -> None:
        """Drops samples that ``keep`` has read."""


@dataclass(frozen=True)
class Dataset:
    """The split and all class numbers are in memory; ``read`` returns inputs for given indices."""

    labels_N: Indices
    """Class numbers; all 0 if the targets are no class numbers."""
    train: Indices
    test: Indices
    shape: Any
    """Shape of a sample, such as (C, H, W); a dict or tuple of shapes if the inputs are that."""
    classes: int
    read: Callable[[Indices, Draw | None], Any]
    """Returns inputs on the CPU: with random transforms for a training step, or without."""
    read_pairs: Callable[[Indices, Draw | None], tuple[Any, Tensor]] | None = None
    """Returns inputs and targets, where the targets are no class numbers; else None."""
    kept: KeptItems | None = None
    """What holds samples before random transforms; None if no transform is random."""
    begin_reading: Callable[[], None] | None = None
    """What all ranks call together before they read; None if there is nothing to do."""
    clients: Sequence[Indices] | None = None
    """Training samples of each natural client, if there are such."""
    client_tests: Mapping[int, Indices] = field(default_factory=dict)
    """Test samples of those natural clients that have such."""
    names: Sequence[str] | None = None
    """Names of the classes, by number, if the data have such."""
    moments: Callable[[], Moments | None] = lambda: None
    """Returns by what inputs were normalised; None if they were not."""
    sample_bytes: int = 0
    """Bytes of an input, as ``take`` returns it or as ``kept`` holds it; 0 if not known."""

    @property
    def has_class_numbers(self) -> bool:
        """Whether each target is a class number, of which partitions and evaluation make use."""
        return self.read_pairs is None

    @property
    def is_image(self) -> bool:
        """Whether inputs have the shape (C, H, W)."""
        return isinstance(self.shape, tuple) and list(map(type, self.shape)) == [int] * 3

    def take(self, indices: Indices, draw: Draw | None = None) -> Samples:
        """Returns the samples at ``indices`` of the whole data set, on the CPU."""
        if self.read_pairs is not None:
            return Samples(*self.read_pairs(indices, draw))
        return Samples(self.read(indices, draw), torch.from_numpy(self.labels_N[indices]))


@dataclass(frozen=True)
class BatchSampler:
    """Draws a client's batches of a round: E batches of B samples each.

    shuffled: the client goes through its samples in random order and starts a new order when fewer
    than B are left; B = min(batch_size, samples).  replacement: each index is drawn independently
    and B = batch_size, as in the authors' code (github wangyanmeng/FedTAN).
    """

    batch_size: int
    steps: int
    """E, unless ``epochs`` is given."""
    seed: int
    sampling: SamplingName = SamplingName.shuffled
    epochs: int | None = None
    """Passes over the client's samples; a pass has as many batches as there are whole ones."""

    @classmethod
    def of(cls, config: Config) -> BatchSampler:
        """Returns the sampler that the options describe."""
        size, steps = config.batch_size, config.local_steps
        return cls(size, steps, config.seed, config.sampling, config.local_epochs)

    def size_of(self, samples: int) -> int:
        """Returns the size of each batch of a client with this number of samples."""
        is_drawn_anew = self.sampling is SamplingName.replacement
        return self.batch_size if is_drawn_anew else min(self.batch_size, samples)

    def steps_of(self, samples: int) -> int:
        """Returns E of a client with this number of samples."""
        if self.epochs is None:
            return self.steps
        return self.epochs * (samples // min(self.batch_size, samples))

    def draw(self, samples: int, client: int, round_number: int) -> Iterator[Tensor]:
        """Yields the indices of the E batches, 0 to ``samples`` - 1, as tensors (steps, B).

        They depend on seed, client and round.  Each tensor has as many steps as fit ``_DRAWN``
        indices, or those of a pass, so that memory does not grow with E.
        """
        key, left = (self.seed, client, round_number), self.steps_of(samples)
        if self.sampling is SamplingName.replacement:
            rng = random_streams.generator(random_streams.REPLACEMENT, *key)
            while left:
                steps = min(left, max(1, _DRAWN // self.batch_size))
                yield torch.from_numpy(rng.integers(samples, size=(steps, self.batch_size)))
                left -= steps
        size = self.size_of(samples)
        per_pass = samples // size
        passes = max(1, _DRAWN // (per_pass * size))
        rng = random_streams.generator(random_streams.BATCHES, *key)
        while left:
            needed = min(passes, -(-left // per_pass))
            orders = [rng.permutation(samples)[: per_pass * size] for _ in range(needed)]
            batches = np.concatenate(orders).reshape(-1, size)[:left]
            yield torch.from_numpy(batches)
            left -= len(batches)
