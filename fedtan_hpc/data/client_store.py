"""Clients and their samples, which a rank loads when it hosts them.

Used by ``training`` and ``evaluation``; ``job`` creates the store.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .batching import Samples
from .datasets import Dataset
from .feature_shift import Shift, clients_of_test
from .partition import Indices


@dataclass(frozen=True)
class Client:
    """A participant of a round: its number, its weight (they sum to 1) and its samples."""

    number: int
    weight: float
    samples: Samples


class ClientStore:
    """Loads the samples of clients, and drops those of the least recently used clients.

    So memory grows with the clients of a round, not with all clients.
    """

    def __init__(
        self,
        dataset: Dataset,
        partition: list[Indices],
        device: torch.device,
        dtype: torch.dtype,
        shift: Shift | None = None,
        seed: int = 0,
    ) -> None:
        self._dataset, self._device, self._dtype, self._seed = dataset, device, dtype, seed
        self.partition = partition
        """Training samples of each client, as indices into the data set."""
        self.shift = shift
        """Feature shift of the clients' inputs, if there is one."""
        self.sizes = [len(indices) for indices in partition]
        """Number of training samples of each client."""
        total = sum(self.sizes)
        self.shares = [size / total for size in self.sizes]
        """p_k of each client: its fraction of all training samples."""
        self._loaded: OrderedDict[int, Samples] = OrderedDict()

    def host(self, weights: dict[int, float]) -> list[Client]:
        """Returns the clients that are keys of ``weights``, with their samples on the device."""
        clients = [Client(number, w, self._load(number)) for number, w in weights.items()]
        while len(self._loaded) > 2 * max(1, len(weights)):
            self._loaded.popitem(last=False)
        return clients

    def dummy(self) -> Samples:
        """Returns one zero sample, with which a rank without clients can run the network."""
        inputs = torch.zeros(1, *self._dataset.shape, dtype=self._dtype)
        return Samples(inputs, torch.zeros(1, dtype=torch.int64)).to(self._device)

    def example(self, size: int) -> Samples:
        """Returns a batch of ``size`` equal samples, with the memory layout of clients' batches."""
        few = self.unshifted(self.partition[0][:2])
        return few[torch.zeros(size, dtype=torch.int64, device=self._device)]

    def label_mix(self, client: int) -> Tensor:
        """Returns the fraction of each class in the client's training samples, (C,) in float64."""
        labels = self._dataset.labels_N[self.partition[client]]
        counts = np.bincount(labels, minlength=self._dataset.classes)
        return torch.from_numpy(counts / counts.sum()).to(self._device)

    def client_samples(self, indices_N: Indices, clients_N: Indices) -> Samples:
        """Returns samples of the data set, each with the feature shift of the client beside it."""
        samples = self.unshifted(indices_N)
        if self.shift is None or not len(indices_N):
            return samples
        return Samples(self.shift.apply_mixed(samples.inputs, clients_N), samples.labels)

    def test_samples(self, indices_N: Indices, positions_N: Indices) -> Samples:
        """Returns test samples at ``indices_N`` of the data set, ``positions_N`` of the test set.

        With a feature shift each test sample is assigned to one client and has that client's shift.
        """
        if self.shift is None:
            return self.unshifted(indices_N)
        clients = clients_of_test(len(self._dataset.test), len(self.sizes), self._seed)
        return self.client_samples(indices_N, clients[positions_N])

    def unshifted(self, indices_N: Indices) -> Samples:
        """Returns samples of the data set on the device, without feature shift."""
        return self._dataset.take(indices_N).to(self._device, self._dtype)

    def shifted(self, samples: Samples, client: int) -> Samples:
        """Returns ``samples`` with the feature shift of ``client``, if there is one."""
        if self.shift is None:
            return samples
        return Samples(self.shift.apply(samples.inputs, client), samples.labels)

    def _load(self, client: int) -> Samples:
        if client not in self._loaded:
            self._loaded[client] = self.shifted(self.unshifted(self.partition[client]), client)
        self._loaded.move_to_end(client)
        return self._loaded[client]
