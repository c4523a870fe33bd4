"""Clients and their samples, which a rank loads when it comes to host them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .datasets import Dataset
from .batching import Samples
from .partition import Indices
from .feature_shift import Shift, clients_of_test


@dataclass(frozen=True)
class Client:
    """A participant: its number, its weight in this round (they sum to 1), its samples."""

    number: int
    weight: float
    samples: Samples


class ClientStore:
    """Samples of the clients that this rank hosts; the least recently used are let go.

    Memory follows the clients of a round, not all that there are.
    """

    def __init__(
        self,
        dataset: Dataset,
        parts: list[Indices],
        device: torch.device,
        dtype: torch.dtype,
        shift: Shift | None = None,
        seed: int = 0,
    ) -> None:
        self._dataset = dataset
        self.parts = parts
        """Each client's training samples, as indices into the data set."""
        self.shift = shift
        """What each client's inputs go through, if there is such a thing."""
        self._seed = seed
        self._device = device
        self._dtype = dtype
        self._loaded: OrderedDict[int, Samples] = OrderedDict()
        total = sum(len(part) for part in parts)
        self.sizes = [len(part) for part in parts]
        """Samples of each client."""
        self.shares = [size / total for size in self.sizes]
        """p_k of each client: its share of all training samples."""

    def host(self, weights: dict[int, float]) -> list[Client]:
        """The clients with their samples on the device; ``weights`` by client."""
        clients = [Client(number, w, self._samples(number)) for number, w in weights.items()]
        while len(self._loaded) > 2 * max(1, len(weights)):
            self._loaded.popitem(last=False)
        return clients

    def dummy(self) -> Samples:
        """One sample, for a rank that has no client to run the network with."""
        inputs = torch.zeros(1, *self._dataset.shape, dtype=self._dtype)
        return Samples(inputs, torch.zeros(1, dtype=torch.int64)).to(self._device)

    def example(self, size: int) -> Samples:
        """A batch of ``size`` as those of clients lie in memory; one sample over and over."""
        few = self._take(self.parts[0][:2]).to(self._device)
        return few[torch.zeros(size, dtype=torch.int64, device=self._device)]

    def label_mix(self, client: int) -> Tensor:
        """Share of each class in the client's training samples, (C,) in float64; they sum to 1."""
        labels = self._dataset.labels_N[self.parts[client]]
        counts = np.bincount(labels, minlength=self._dataset.classes)
        return torch.from_numpy(counts / counts.sum()).to(self._device)

    def of_clients(self, indices: Indices, clients: Indices) -> Samples:
        """Samples of the data set on the device, each as the client beside it sees it."""
        samples = self._take(indices)
        if self.shift is None or not len(indices):
            return samples
        return Samples(self.shift.apply_mixed(samples.inputs, clients), samples.labels)

    def test_samples(self, indices: Indices, places: Indices) -> Samples:
        """Test samples at ``places`` of the test set; under a shift each as some client sees it."""
        if self.shift is None:
            return self._take(indices)
        owners = clients_of_test(len(self._dataset.test), len(self.sizes), self._seed)
        return self.of_clients(indices, owners[places])

    def unshifted(self, indices: Indices) -> Samples:
        """Samples of the data set on the device, as no client sees them."""
        return self._take(indices)

    def shifted(self, samples: Samples, client: int) -> Samples:
        """Those samples as ``client`` sees them."""
        assert self.shift is not None
        return Samples(self.shift.apply(samples.inputs, client), samples.labels)

    def _take(self, indices: Indices) -> Samples:
        return self._dataset.take(indices).to(self._device, self._dtype)

    def _samples(self, number: int) -> Samples:
        if number not in self._loaded:
            samples = self._take(self.parts[number])
            if self.shift is not None:
                samples = Samples(self.shift.apply(samples.inputs, number), samples.labels)
            self._loaded[number] = samples
        self._loaded.move_to_end(number)
        return self._loaded[number]
