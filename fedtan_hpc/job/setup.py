"""From the options to a trainer: data, partition, model, and what trains and evaluates it.

``job.run`` calls ``prepare``; benchmarks and tests build parts with ``network`` and ``host``.
"""

import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..batchnorm.conversion import batchnorm_layers, convert_batchnorm
from ..batchnorm.running_norm import normalise_by_running
from ..config.algorithms import ALGORITHMS, Normaliser, ParameterGroup, plan
from ..config.dataset_info import DatasetInfo
from ..config.enums import LoadingName, ModelSource, PartitionName, PrecisionName, TaskName
from ..config.errors import ConfigError, printable
from ..config.schema import Config
from ..config.validation.data import own_data_mistakes, partition_mistakes
from ..config.validation.optimizing import epoch_mistakes
from ..data import datasets, loading, memory_need
from ..data.batching import BatchSampler, Dataset, Samples
from ..data.client_store import ClientStore
from ..data.loading import Need, Reader
from ..data.own import datasets as own_datasets
from ..distributed import collectives, process_group, structure
from ..distributed.model_average import model_tensors, named_tensors
from ..evaluation.evaluator import Evaluator
from ..evaluation.probe_records import ProbeRecord
from ..models import factory, weights
from ..models.freezing import freeze
from ..models.norms import with_norm_of
from ..models.parameter_groups import TensorFilter
from ..probing.probe import Probe
from ..probing.schedule import Schedule
from ..runtime import free_memory, global_random
from ..runtime.device import DevicePlacement
from ..training import compile_step
from ..training.client_ranks import ALONE, ClientRanks
from ..training.client_runners import ClientModels, make_runners
from ..training.client_state import PrivateStates
from ..training.cohort import Cohort
from ..training.local_step import Loss
from ..training.memory_budget import MemoryBudget
from ..training.server_optimizer import ServerOptimizer
from .trainer import Trainer

DTYPES = dict.fromkeys(PrecisionName, torch.float32) | {PrecisionName.float64: torch.float64}
"""Type of model and data; bfloat16 is the type of autocast only."""


@dataclass(frozen=True)
class OpenedData:
    """The data as a run finds them before its folder is made."""

    dataset: Dataset | None
    """The user's data; built-in data are loaded by ``prepare``."""
    is_streamed: bool
    note: str
    """A line for the user; empty where all is as ever."""
    saved_probes: Sequence[ProbeRecord] = ()
    """Those of ``algorithm.probe_run``."""


def open_data(config: Config, placement: DevicePlacement) -> tuple[Config, OpenedData]:
    """Opens the user's data, and decides where samples lie; all ranks call it together.

    Returns the options with the number of clients that the data have.  Raises ``ConfigError`` on
    all ranks if the data cannot be used, or do not fit.
    """
    data, dataset = config.data, None
    if data.is_own:
        config, dataset = load_own(config)
        sizes = [len(each) for each in datasets.partition_of(dataset, config)]
        is_random = dataset.kept is not None
        need = Need(_info(dataset), dataset.sample_bytes, sizes, is_random)
    else:
        sample_bytes = math.prod(data.info().shape) * DTYPES[config.precision].itemsize
        need = Need(data.info(), sample_bytes)
    sharing, info, note = placement.ranks_per_device, need.info, ""
    is_streamed, why = loading.is_streamed(config, need, placement.device, sharing)
    if dataset is not None and dataset.begin_reading is not None:
        dataset.begin_reading()
    if is_streamed or data.is_own or data.loading is not LoadingName.auto:
        how = LoadingName.stream if is_streamed else LoadingName.device
        what = "values to predict" if config.task.name is TaskName.regression else "classes"
        note = (
            f"data: {info.train} training and {info.test} test samples of shape {info.shape}, "
            f"{info.classes} {what}, {config.clients} clients; data.loading={how} ({why})"
        )
        note += f", data.workers={loading.workers_of(config)}" if is_streamed else ""
    return config, OpenedData(dataset, is_streamed, note)


def check_memory(config: Config, placement: DevicePlacement, ranks: int) -> None:
    """Raises ``ConfigError`` if data, models or clients' states cannot fit into a rank's memory.

    What it needs follows from the options, so that nothing has to be made for it; the user's data
    and networks are left out, as their sizes are not known.
    """
    if config.data.is_own:
        return
    free = free_memory.host_bytes(placement.ranks_on_node)
    memory_need.check(memory_need.data_bytes(config), free)
    states = _states_on_rank(config, ranks) if ALGORITHMS[config.algorithm.name].private else 0
    if free is None or 8 * _most_values(config) * (2 + states) <= free:
        return
    try:
        with global_random.preserved(), torch.device("meta"):
            model = network(config, config.data.info().shape, config.data.info().classes)
    except Exception:  # what is wrong with the network is found, and told, by ``dry_run``
        return
    if placement.device.type == "cuda" and free is not None:  # states move to the host
        free += free_memory.free_bytes(placement.device, placement.ranks_per_device) or 0
    memory_need.check(_model_bytes(config, model, ranks), free)


def _most_values(config: Config) -> int:
    """Returns more values than a network without code of the user has, torchvision's included.

    To make one on the meta device takes torch seconds, the first time.
    """
    info, is_builtin = config.data.info(), config.model.source is ModelSource.builtin
    largest = 20_000_000 if is_builtin else 1_000_000_000
    return largest + 128 * math.prod(info.shape) + 4096 * (info.shape[0] + info.classes)


def _states_on_rank(config: Config, ranks: int) -> int:
    """Returns how many clients' states a rank has in the end."""
    drawn = min(config.clients, config.rounds * (config.clients_per_round or config.clients))
    return -(-drawn // max(1, ranks // config.ranks_per_client))  # the first rank of a group


def _model_bytes(config: Config, model: nn.Module, ranks: int) -> dict[str, int]:
    """Returns the bytes of a model with its gradients, and of the states of a rank's clients."""
    private = TensorFilter(model, ALGORITHMS[config.algorithm.name].private)(model).values()
    factor = DTYPES[config.precision].itemsize / 4
    states = _states_on_rank(config, ranks) * sum(value.nbytes for value in private)
    values = 2 * sum(value.nbytes for value in model_tensors(model))
    return {
        f"model.name={config.model.name}": int(factor * values),
        f"clients={config.clients}": int(factor * states),
    }


def load_own(config: Config) -> tuple[Config, Dataset]:
    """Opens the user's data; returns them, and the options with the number of natural clients.

    Raises ``ConfigError`` on all ranks if the options do not fit the data.
    """
    dataset = datasets.load(config.data, config.seed, config.task)
    info, natural = _info(dataset), None if dataset.clients is None else len(dataset.clients)
    mistakes = [*own_data_mistakes(config, info, natural)]
    if config.partition.name is PartitionName.natural and not mistakes:
        assert dataset.clients is not None
        config = replace(config, clients=len(dataset.clients))
        own_datasets.check_clients(dataset.clients)
    elif not mistakes:
        mistakes = [*partition_mistakes(config, info)]
    if mistakes:
        error = ConfigError(*mistakes)
        error.on_all_ranks = True
        raise error
    return config, dataset


def _info(dataset: Dataset) -> DatasetInfo:
    return DatasetInfo(len(dataset.train), len(dataset.test), dataset.shape, dataset.classes)


def prepare(
    config: Config, placement: DevicePlacement, opened: OpenedData | None = None
) -> Trainer:
    """Makes the trainer; every rank derives the same data, partition and model."""
    device, dtype = placement.device, DTYPES[config.precision]
    if opened is None:
        config, opened = open_data(config, placement)
    dataset = opened.dataset or datasets.load(config.data, config.seed)
    indices = datasets.partition_of(dataset, config)
    config = with_steps(config, [len(each) for each in indices])
    workers = loading.workers_of(config) if opened.is_streamed else 0
    reader = Reader(dataset, device, dtype, workers)
    ranks = ClientRanks.of(config.ranks_per_client)
    _warn_of_nodes(config)
    store = ClientStore(dataset, indices, reader, config, opened.is_streamed, ranks.part)
    model = network(config, dataset.shape, dataset.classes).to(device, dtype)
    if config.model.weights is not None:
        weights.load(model, config.model.weights)
    described = structure.described(named_tensors(model))
    structure.agree("models", "the start of training", described, None, device)
    collectives.broadcast_tensors(model_tensors(model))
    one_each = _one_client_per_rank(config, store)
    batch = store.example(config.batch_size) if config.compile else None
    hosting = Hosting(ranks, placement.ranks_per_device, one_each)
    dummy = store.dummy()
    cohort = host(config, model, dummy, hosting, batch)
    evaluator = Evaluator(cohort, dataset, store, config)
    probe = Probe(cohort.runner.models, dummy, cohort.runner.budget)
    schedule = Schedule(config, list(batchnorm_layers(model)), opened.saved_probes)
    return Trainer(config, store, cohort, evaluator, probe, schedule)


def _warn_of_nodes(config: Config) -> None:
    """Says on rank 0 if a client's ranks are on several nodes, between which sums are slow."""
    size = config.ranks_per_client
    if size == 1:
        return
    nodes = collectives.all_gather_object(platform.node())
    for start in range(0, len(nodes), size):
        names = sorted(set(nodes[start : start + size]))
        if len(names) > 1 and process_group.rank() == 0:
            which = f"ranks {start} to {start + size - 1}, which hold one client,"
            where = f"are on the nodes {', '.join(names[:5])}"
            why = "number ranks node by node, so that a client's sums stay on one node"
            line = f"ranks_per_client={size}: {which} {where}: {why}"
            print(printable(line), file=sys.stderr, flush=True)
            return


def with_steps(config: Config, sizes: Sequence[int]) -> Config:
    """Returns the options with ``local_steps`` the most steps of clients of these ``sizes``.

    Raises ``ConfigError`` on all ranks if ``local_epochs`` gives some clients too few steps.
    """
    sampler = BatchSampler.of(config)
    steps = [sampler.steps_of(size) for size in sizes]
    if mistakes := [*epoch_mistakes(config, steps)]:
        error = ConfigError(*mistakes)
        error.on_all_ranks = True
        raise error
    return replace(config, local_steps=max(steps))


def _one_client_per_rank(config: Config, store: ClientStore) -> bool:
    """Returns the same on every rank: compiled and eager ranks must not meet in a step."""
    per_round = config.clients_per_round or config.clients
    return per_round == process_group.world_size() and min(store.sizes) >= config.batch_size


class Hosting(NamedTuple):
    """How the clients of a job are spread over ranks and devices."""

    ranks: ClientRanks = ALONE
    ranks_per_device: int = 1
    """Ranks that share the device's memory."""
    one_client_per_rank: bool = False
    """Whether every rank has one client with whole batches in every round."""


def host(
    config: Config,
    model: nn.Module,
    dummy: Samples,
    hosting: "Hosting | None" = None,
    example: Samples | None = None,
) -> Cohort:
    """Makes the cohort, which trains ``model`` with the clients of this rank.

    Args:
        config: the options of the job.
        model: the global model, with the algorithm's normalization layers.
        dummy: a single sample, for ranks without a client.
        hosting: which ranks hold clients; by default each by itself, with a device of its own.
        example: a batch like those of the clients; only needed if steps are compiled.
    """
    loss, hosting = Loss.of(config), hosting or Hosting()
    if config.compile:
        assert example is not None, "steps are compiled for batches like an example"
        plans = plan(config, 1), plan(config, config.rounds)
        synchronised = hosting.one_client_per_rank and plans[0].synchronised_steps > 0
        local = [each for each in plans if each.synchronised_steps < config.local_steps]
        loss = compile_step.compiled(loss, model, example, local, synchronised)
    private = ALGORITHMS[config.algorithm.name].private
    budget = MemoryBudget(model, dummy, config, hosting.ranks_per_device, loss.objective)
    states = PrivateStates(model, private, budget.leaves_room_for)
    models = ClientModels(model, config, loss, states, hosting.ranks)
    untrained = {ParameterGroup.statistics, ParameterGroup.buffers}
    trained = TensorFilter(model, set(ParameterGroup) - untrained - private)
    server = ServerOptimizer(config.server, trained)
    runners = make_runners(models, dummy, budget, hosting.one_client_per_rank)
    return Cohort(models, server, runners)


def network(config: Config, shape: Any, classes: int) -> nn.Module:
    """Makes the network with the algorithm's norm layers; ``shape`` is that of a sample."""
    algorithm = ALGORITHMS[config.algorithm.name]
    model = factory.build(config.model, shape, classes, config.seed)
    model = convert_batchnorm(with_norm_of(config, model))
    if algorithm.normaliser is Normaliser.running:
        model = normalise_by_running(model, algorithm.mixes)
    model = freeze(model, config.model.freeze)
    if config.channels_last and config.precision is not PrecisionName.float64:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
