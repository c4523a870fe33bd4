"""Batches of samples that do not all lie in memory, read by workers ahead of their use.

A request is one batch of a step in training, or of an evaluation.  The workers are those of torch's
``DataLoader``; what they read does not depend on their number.  Used by ``client_store``.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..config.algorithms import ALGORITHMS
from ..config.dataset_info import DatasetInfo
from ..config.enums import LoadingName, PartitionName
from ..config.errors import ConfigError, format_option_error, one_line
from ..config.schema import Config
from ..distributed import collectives, process_group
from ..runtime import launcher_env
from ..runtime.free_memory import free_bytes
from ..runtime.signals import STOP_SIGNALS
from .batching import Dataset, Draw, Samples
from .own.items import DataError
from .partition import Indices

_SAFE_SHARE = 0.5
"""Part of the free memory that the samples may take with data.loading=auto."""


class Request(NamedTuple):
    """A batch to read: samples of the whole data set, for a training step or for evaluation."""

    indices: Indices
    draw: Draw | None


class Reader:
    """Reads batches of ``dataset``; those of training steps ahead of their use, with workers.

    ``upcoming`` returns the requests of a round's steps, in their order, and None after the last
    round; without it each batch is read when it is asked for.
    """

    def __init__(
        self, dataset: Dataset, device: torch.device, dtype: torch.dtype, workers: int
    ) -> None:
        self._dataset, self.device, self._dtype, self._workers = dataset, device, dtype, workers
        self.upcoming: Callable[[int], Iterable[Request] | None] | None = None
        self._iterator: Iterator[Any] | None = None
        self._ready: dict[Draw, Any] = {}
        self._lock = threading.Lock()  # clients in lock-step ask from threads

    def read(self, request: Request) -> Samples:
        """Reads a batch now; returns it on the device."""
        return self._sent(_read(self._dataset, request))

    def batch(self, request: Request) -> Samples:
        """Returns the batch of a training step, if possible the one that was read ahead."""
        if request.draw is None or self.upcoming is None or not self._workers:
            return self.read(request)
        with self._lock:
            result = self._awaited(request.draw)
        return self.read(request) if result is None else self._sent(result)

    def batches(self, requests: Sequence[Request]) -> Iterator[Samples]:
        """Reads batches for evaluation, one after another."""
        # A worker's start takes longer than what it reads beside the rank, if that is one batch.
        workers = min(self._workers, len(requests)) if len(requests) > 1 else 0
        results = iter(self._loader(requests, workers))
        for _ in requests:
            yield self._sent(_next(results)[1])

    def close(self) -> None:
        """Ends the workers."""
        self._iterator = None
        self._ready.clear()

    def _awaited(self, draw: Draw) -> Any:
        """Waits for a batch that is read ahead; returns None if it is not among the upcoming."""
        if self._iterator is None:
            self._iterator = iter(self._loader(self._from_round(draw.round), self._workers))
        while draw not in self._ready:
            try:
                found, result = _next(self._iterator)
            except StopIteration:
                self._iterator = None
                return None
            if found.round >= draw.round:
                self._ready[found] = result
            if found.round > draw.round:
                return None
        return self._ready.pop(draw)

    def _from_round(self, number: int) -> Iterator[Request]:
        assert self.upcoming is not None
        while (requests := self.upcoming(number)) is not None:
            yield from requests
            number += 1

    def _loader(self, requests: Iterable[Request], workers: int) -> Iterable[tuple[Any, Any]]:
        options: dict[str, Any] = {}
        if workers:  # forked: what reads the data need not be picklable
            options = {"multiprocessing_context": "fork", "worker_init_fn": _begin_worker}
        return _Loader(
            _Requests(self._dataset),
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=self.device.type == "cuda",
            **options,
        )

    def _sent(self, result: Any) -> Samples:
        if isinstance(result, DataError):
            raise result
        return Samples(*result).to(self.device, self._dtype)


class _Loader(DataLoader[Any]):
    def check_worker_number_rationality(self) -> None:
        """Is silent where torch warns, at each evaluation, of more workers than CPUs."""


class _Requests(torch.utils.data.Dataset[Any]):
    """Reads a batch for each request; returns errors, of which torch would print a traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, request: Request) -> tuple[Draw | None, Any]:
        try:
            return request.draw, _read(self._dataset, request)
        except DataError as error:
            return request.draw, error


def _next(results: Iterator[Any]) -> Any:
    """Returns the next result; raises torch's kind of error also where torch lets others pass."""
    try:
        return next(results)
    except (OSError, EOFError) as error:  # the worker died while it handed over a batch
        raise RuntimeError(f"DataLoader worker has died: {one_line(error)}") from error


def _read(dataset: Dataset, request: Request) -> tuple[Any, Tensor]:
    samples = dataset.take(*request)
    return samples.inputs, samples.labels


def _unchanged(result: Any) -> Any:
    return result


def _begin_worker(_: int) -> None:
    """Lets a worker outlive the signals that stop a job: its rank ends it after the round."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class ReadSamples:
    """A client's samples, read batch by batch; ``then`` changes a batch on the device."""

    reader: Reader
    indices: Indices
    then: Callable[[Samples], Samples]
    is_read_ahead: bool = True

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def device(self) -> torch.device:
        """The device of the batches."""
        return self.reader.device

    def batch(self, draw: Draw, indices: Tensor) -> Samples:
        """Returns the samples at ``indices``, 0 to N - 1, for the step of ``draw``."""
        read = self.reader.batch if self.is_read_ahead else self.reader.read
        return self.then(read(Request(self.indices[indices.cpu().numpy()], draw)))

    def apart(self) -> "ReadSamples":
        """Returns samples with the same batches, which take none that training has read ahead."""
        return replace(self, is_read_ahead=False)


@dataclass(frozen=True)
class EvaluationSamples:
    """Samples for evaluation, batch by batch; they can be read again and again."""

    reader: Reader
    indices: Indices
    then: Callable[[Samples, slice], Samples]
    """Changes the samples of a slice of ``indices`` on the device."""
    held: Samples | None = None
    """All samples, if they stay in memory."""

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Samples]:
        if self.held is not None:
            yield from self.held.evaluation_batches()
            return
        if not len(self):
            return
        few = self.reader.read(Request(self.indices[:1], None))
        size = few.evaluation_batch_size()
        slices = [slice(start, start + size) for start in range(0, len(self), size)]
        requests = [Request(self.indices[part], None) for part in slices]
        for part, samples in zip(slices, self.reader.batches(requests), strict=True):
            yield self.then(samples, part)


@dataclass(frozen=True)
class Need:
    """The samples that a rank would have in memory, with ``data.loading=device``."""

    info: DatasetInfo
    sample_bytes: int
    sizes: Sequence[int] | None = None
    """Training samples of each client, if they are known; else equal."""
    is_random: bool = False
    """Whether training samples change at random, so that they stay on the host as they are read."""

    def bytes(self, config: Config, ranks: int) -> int:
        """Returns the bytes on the rank that needs the most."""
        drawn = config.clients_per_round or config.clients
        hosted = -(-drawn // max(1, ranks // config.ranks_per_client))
        if drawn < config.clients:  # those of the last round stay
            hosted = min(2 * hosted, config.clients)
        sizes = self.sizes or [-(-self.info.train // config.clients)] * hosted
        samples = sum(sorted(sizes)[-hosted:])
        if ALGORITHMS[config.algorithm.name].has_client_models:
            has_shift = config.partition.name is PartitionName.feature_shift
            samples += self.info.test * (2 if has_shift else 1)  # for the clients' models
        else:
            evaluated = self.info.test + min(config.eval_train_samples, self.info.train)
            samples += -(-evaluated // ranks)
        return samples * self.sample_bytes


def is_streamed(config: Config, need: Need, device: torch.device, sharing: int) -> tuple[bool, str]:
    """Returns whether a rank reads its samples batch by batch, and the reason in words.

    The same on all ranks.  ``sharing`` ranks share the device's memory.  Raises ``ConfigError`` if
    ``data.loading=device`` needs more memory than there is.
    """
    needed = need.bytes(config, process_group.world_size())
    device = torch.device("cpu") if need.is_random else device
    all_free = collectives.all_gather_object(free_bytes(device, sharing))
    free = min((each for each in all_free if each is not None), default=None)
    sizes = f"{needed / 1e9:.2f} GB of samples on a rank"
    sizes += "" if free is None else f", {free / 1e9:.2f} GB are free"
    if config.data.loading is not LoadingName.auto:
        is_stream = config.data.loading is LoadingName.stream
        if not is_stream and free is not None and needed > free:
            allowed, remedy = f"auto or stream, for device needs {sizes}", "use data.loading=stream"
            error = ConfigError(format_option_error("data.loading", "device", allowed, remedy))
            error.on_all_ranks = True
            raise error
        return is_stream, sizes
    if need.is_random and config.data.is_own:
        return True, "transforms are random"
    return free is not None and needed > _SAFE_SHARE * free, sizes


def is_worker_error(error: BaseException) -> bool:
    """Whether ``error`` is torch's for a worker that has died."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def workers_of(config: Config) -> int:
    """Returns ``data.workers``; by default one CPU of a rank is left for the rank itself."""
    if config.data.workers is not None:
        return config.data.workers
    return max(1, min(8, launcher_env.cpus_of_rank() - 1))
