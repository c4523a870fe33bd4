"""Rounds to time: one client on each rank, random samples of the data set's shape."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from fedtan_hpc.config.algorithms import plan
from fedtan_hpc.config.enums import AlgorithmName
from fedtan_hpc.config.schema import AlgorithmConfig, Config
from fedtan_hpc.data.batching import Samples
from fedtan_hpc.data.client_store import Client
from fedtan_hpc.distributed import process_group
from fedtan_hpc.job.setup import DTYPES, Hosting, host, network
from fedtan_hpc.models import factory
from fedtan_hpc.training.client_ranks import ALONE, ClientRanks
from fedtan_hpc.training.cohort import Cohort
from fedtan_hpc.training.local_step import RoundContext


def build(config: Config, name: str, compiled: bool, device: torch.device) -> Callable[[], object]:
    """Returns a function that runs a round of plain, local, fedavg or fedtan."""
    if name == "plain":
        return plain(config, plain_network(config, device), random_samples(config, device))
    algorithm = config.algorithm
    if name != "fedtan":
        method = AlgorithmName.singleset if name == "local" else AlgorithmName.fedavg
        algorithm = AlgorithmConfig(name=method)
    elif algorithm.name is not AlgorithmName.fedtan:
        algorithm = AlgorithmConfig()
    return one_client(replace(config, compile=compiled, algorithm=algorithm), device)


def random_samples(config: Config, device: torch.device) -> Samples:
    """Returns this rank's samples: as many as the local steps of one round use."""
    info, size = config.data.info(), config.batch_size * config.local_steps
    generator = torch.Generator().manual_seed(process_group.rank())
    inputs = torch.randn(size, *info.shape, generator=generator)
    labels = torch.randint(0, info.classes, (size,), generator=generator)
    return Samples(inputs, labels).to(device)


def train_round(cohort: Cohort, clients: Sequence[Client], context: RoundContext) -> object:
    """Runs one round as the job does: local steps of the rank's clients, then the average."""
    model_sum = cohort.begin_round(context)
    losses = cohort.runner.run(clients, context, model_sum)
    cohort.end_round(model_sum)
    return losses


def one_client(
    config: Config, device: torch.device, ranks: ClientRanks = ALONE
) -> Callable[[], object]:
    """Returns a function that runs the job's round: local steps, global statistics, average.

    Without a process group the rank trains by itself and sends nothing.  Each group of ``ranks``
    has one client.
    """
    info = config.data.info()
    model = network(config, info.shape, info.classes).to(device, DTYPES[config.precision])
    samples = random_samples(config, device)
    batch = samples[torch.arange(config.batch_size, device=samples.labels.device)]
    cohort = host(config, model, samples[:1], Hosting(ranks, one_client_per_rank=True), batch)
    context = RoundContext(1, config.optimizer.lr, plan(config, 1))
    size = ranks.part.members

    def run() -> object:
        group, groups = process_group.rank() // size, process_group.world_size() // size
        return train_round(cohort, [Client(group, 1 / groups, samples)], context)

    return run


def plain_network(config: Config, device: torch.device) -> nn.Module:
    """Returns the network with torch's own BN layers, in contiguous memory."""
    info = config.data.info()
    return factory.build(config.model, info.shape, info.classes, seed=0).to(device).train()


def plain(config: Config, model: nn.Module, samples: Samples) -> Callable[[], None]:
    """Returns a function that runs local steps as a user writes them, with a new torch SGD."""
    options = config.optimizer

    def run() -> None:
        order = torch.randperm(len(samples), device=samples.labels.device)
        optimizer = torch.optim.SGD(
            model.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay
        )
        for batch in order.split(config.batch_size):
            optimizer.zero_grad()
            cross_entropy(model(samples.inputs[batch]), samples.labels[batch]).backward()
            optimizer.step()

    return run


class SharedClientRound:
    """The job's round with ``size`` ranks for each client; ``begin`` makes their groups."""

    _run: Callable[[], object]

    def __init__(self, config: Config, name: str, size: int, device: torch.device) -> None:
        self._overlaps = name != "fedavg"
        method = AlgorithmConfig(name=AlgorithmName("fedavg" if name == "overlapped" else name))
        self._config = replace(config, algorithm=method, ranks_per_client=size)
        self._size, self._device = size, device

    def begin(self) -> None:
        """Prepares the round in the current process group, and runs it once to warm up."""
        ranks = ClientRanks.of(self._size, self._overlaps)
        self._run = one_client(self._config, self._device, ranks)
        self._run()

    def __call__(self) -> None:
        """Runs a round; ``begin`` comes first."""
        self._run()


def on_rank_0(run: Callable[[], object]) -> Callable[[], None]:
    """Returns a function that calls ``run`` on rank 0; the others wait for it."""

    def called() -> None:
        if process_group.rank() == 0:
            run()
        process_group.barrier()

    return called


class DataParallelRound:
    """torch's own way to the pooled gradient: SyncBatchNorm and DistributedDataParallel.

    A round has E steps of all ranks on their own samples.  Each step synchronises statistics and
    gradients, as FedTAN with one local step does.  SyncBatchNorm works on several ranks on GPUs
    only.  DistributedDataParallel belongs to a process group: ``begin`` is called in each new one.
    """

    _steps: Callable[[], None]

    def __init__(self, config: Config, device: torch.device) -> None:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(plain_network(config, device))
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        self._config, self._device = config, device
        self._samples = random_samples(config, device)

    def begin(self) -> None:
        """Wraps the model for the current process group, and runs one round to warm up."""
        devices = [self._device] if self._device.type == "cuda" else None
        parallel = DistributedDataParallel(self.model, device_ids=devices)
        self._steps = plain(self._config, parallel, self._samples)
        self._steps()

    def __call__(self) -> None:
        """Runs a round; ``begin`` comes first."""
        self._steps()
