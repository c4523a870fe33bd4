"""Clients and their samples, which a rank loads when it comes to host them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .data import Dataset, Samples
from .partition import Indices


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
        parts: Sequence[Indices],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._dataset = dataset
        self._parts = parts
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

    def _samples(self, number: int) -> Samples:
        if number not in self._loaded:
            taken = self._dataset.take(self._parts[number])
            self._loaded[number] = taken.to(self._device, self._dtype)
        self._loaded.move_to_end(number)
        return self._loaded[number]
