"""Clients and their samples, which a rank loads when it hosts them.

Used by ``training`` and ``evaluation``; ``job`` creates the store.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.enums import PartitionName
from ..config.schema import Config
from .batching import WHOLE, BatchSampler, ClientSamples, Dataset, Draw, Part, Samples
from .feature_shift import clients_of_test, shift_of
from .loading import EvaluationSamples, Reader, ReadSamples, Request
from .partition import Indices


@dataclass(frozen=True)
class Client:
    """A participant of a round: its number, its weight (they sum to 1) and its samples."""

    number: int
    weight: float
    samples: ClientSamples


class ClientStore:
    """Loads the samples of clients, and drops those of the least recently used clients.

    So memory grows with the clients of a round, not with all clients.  A store that ``is_streamed``
    keeps no samples.
    """

    def __init__(
        self,
        dataset: Dataset,
        partition: Sequence[Indices],
        reader: Reader,
        config: Config,
        is_streamed: bool = False,
        part: Part = WHOLE,
    ) -> None:
        self._dataset, self._reader, self._config = dataset, reader, config
        self._is_streamed, self._part = is_streamed, part
        self.partition = partition
        """Training samples of each client, as indices into the data set."""
        self.shift = shift_of(config.partition, len(partition))
        """Feature shift of the clients' inputs, if there is one."""
        self.sizes = [len(indices) for indices in partition]
        """Number of training samples of each client."""
        sampler = BatchSampler.of(config)
        self.steps = [sampler.steps_of(size) for size in self.sizes]
        """Number of local steps E of each client in a round."""
        total = sum(self.sizes)
        self.shares = [size / total for size in self.sizes]
        """p_k of each client: its fraction of all training samples."""
        is_natural = config.partition.name is PartitionName.natural
        self.client_tests = dataset.client_tests if is_natural else {}
        """Test samples of those clients that have such, as indices into the data set."""
        self._loaded: OrderedDict[int, ClientSamples] = OrderedDict()

    def host(self, weights: dict[int, float]) -> list[Client]:
        """Returns the clients that are keys of ``weights``, with their samples on the device."""
        clients = [Client(number, w, self._load(number)) for number, w in weights.items()]
        while len(self._loaded) > 2 * max(1, len(weights)):
            dropped, _ = self._loaded.popitem(last=False)
            if (kept := self._dataset.kept) is not None:
                kept.drop(self.partition[dropped])
        return clients

    def read_ahead(self, order: Callable[[int], Iterable[tuple[int, int]] | None]) -> None:
        """Lets workers read the batches of (client, step) in the ``order`` of each round.

        ``order`` takes a round's number and returns None after the last one.  In it the steps of
        each client ascend from 0.
        """

        def upcoming(number: int) -> Iterable[Request] | None:
            steps = order(number)
            return None if steps is None else self._requests(steps, number)

        self._reader.upcoming = upcoming

    def close(self) -> None:
        """Ends the workers that read samples."""
        self._reader.close()

    def description(self) -> dict[str, Any]:
        """Returns what one must know of the data to use the network later, for JSON."""
        data = self._dataset
        moments = data.moments()
        return {
            "shape": json.loads(json.dumps(data.shape)),  # lists, as they are read again
            "classes": data.classes,
            "class_names": data.names,
            "normalisation": None if moments is None else moments._asdict(),
        }

    def dummy(self) -> Samples:
        """Returns zeros with the target of a sample, which a rank without clients can run."""
        return self.unshifted(self.partition[0][:1]).map_inputs(torch.zeros_like)

    def example(self, size: int) -> Samples:
        """Returns a batch of ``size`` equal samples, with the memory layout of clients' batches."""
        few = self.unshifted(self.partition[0][:2])
        return few[torch.zeros(size, dtype=torch.int64, device=self._reader.device)]

    def label_mix(self, client: int) -> Tensor:
        """Returns the fraction of each class in the client's training samples, (C,) in float64."""
        labels = self._dataset.labels_N[self.partition[client]]
        counts = np.bincount(labels, minlength=self._dataset.classes)
        return torch.from_numpy(counts / counts.sum()).to(self._reader.device)

    def client_samples(self, indices_N: Indices, clients_N: Indices) -> EvaluationSamples:
        """Returns samples of the data set, each with the feature shift of the client beside it."""

        def then(samples: Samples, part: slice) -> Samples:
            if self.shift is None or not len(samples):
                return samples
            shift, clients = self.shift, clients_N[part]
            return samples.map_inputs(lambda values: shift.apply_mixed(values, clients))

        return self._evaluated(indices_N, then)

    def test_samples(self, indices_N: Indices, positions_N: Indices) -> EvaluationSamples:
        """Returns test samples at ``indices_N`` of the data set, ``positions_N`` of the test set.

        With a feature shift each test sample is assigned to one client and has that client's shift.
        """
        count, seed = len(self._dataset.test), self._config.seed
        return self.client_samples(
            indices_N, clients_of_test(count, len(self.sizes), seed)[positions_N]
        )

    def shifted_as(self, samples: EvaluationSamples, client: int) -> EvaluationSamples:
        """Returns ``samples``, which have no feature shift, with that of ``client``."""
        return EvaluationSamples(
            samples.reader,
            samples.indices,
            lambda batch, part: self._shifted(samples.then(batch, part), client),
            None if samples.held is None else self._shifted(samples.held, client),
        )

    def unshifted_samples(self, indices_N: Indices) -> EvaluationSamples:
        """Returns samples of the data set, without feature shift."""
        return self._evaluated(indices_N, lambda samples, _: samples)

    def unshifted(self, indices_N: Indices) -> Samples:
        """Reads samples of the data set, without feature shift and random transforms."""
        return self._reader.read(Request(indices_N, None))

    def _evaluated(
        self, indices_N: Indices, then: Callable[[Samples, slice], Samples]
    ) -> EvaluationSamples:
        held = None if self._is_streamed else then(self.unshifted(indices_N), slice(None))
        return EvaluationSamples(self._reader, indices_N, then, held)

    def _shifted(self, samples: Samples, client: int) -> Samples:
        if self.shift is None:
            return samples
        shift = self.shift
        return samples.map_inputs(lambda values: shift.apply(values, client))

    def _requests(self, order: Iterable[tuple[int, int]], number: int) -> Iterator[Request]:
        """Yields the requests of a round's steps."""
        batches: dict[int, Iterator[Indices]] = {}
        for client, step in order:
            if step == 0:
                batches[client] = self._batches(client, number)
            batch = next(batches[client])
            yield Request(batch[self._part.of(len(batch))], Draw(client, number, step))
            if step == self.steps[client] - 1:
                del batches[client]

    def _batches(self, client: int, round_number: int) -> Iterator[Indices]:
        """Yields the samples of each of a client's batches in a round, (B,) indices."""
        sampler = BatchSampler.of(self._config)
        for drawn_EB in sampler.draw(self.sizes[client], client, round_number):
            yield from self.partition[client][drawn_EB.numpy()]

    def _load(self, client: int) -> ClientSamples:
        if client not in self._loaded:
            self._loaded[client] = self._new(client)
        self._loaded.move_to_end(client)
        return self._loaded[client]

    def _new(self, client: int) -> ClientSamples:
        indices = self.partition[client]
        kept = self._dataset.kept
        if not self._is_streamed and kept is None:
            return self._shifted(self.unshifted(indices), client)
        if not self._is_streamed and kept is not None:
            kept.keep(indices)
        return ReadSamples(self._reader, indices, lambda samples: self._shifted(samples, client))
