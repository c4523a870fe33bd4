"""From the options to a trainer: data, partition, model, and what trains and evaluates it.

``job.run`` calls ``prepare``; benchmarks and tests build parts with ``network`` and ``host``.
"""

import torch
from torch import nn

from ..batchnorm.conversion import convert_batchnorm
from ..batchnorm.running_norm import normalise_by_running
from ..config.algorithms import ALGORITHMS, Normaliser, ParameterGroup, plan
from ..config.enums import PrecisionName
from ..config.schema import Config
from ..data import datasets, partition
from ..data.batching import Samples
from ..data.client_store import ClientStore
from ..data.feature_shift import shift_of
from ..distributed import collectives, process_group, structure
from ..distributed.model_average import model_tensors, named_tensors
from ..evaluation.evaluator import Evaluator
from ..models import factory
from ..models.norms import with_norm_of
from ..models.parameter_groups import TensorFilter
from ..runtime.device import DevicePlacement
from ..training import compile_step
from ..training.client_runners import ClientModels, make_runners
from ..training.client_state import PrivateStates
from ..training.cohort import Cohort
from ..training.local_step import Loss
from ..training.memory_budget import MemoryBudget
from ..training.server_optimizer import ServerOptimizer
from .trainer import Trainer

DTYPES = dict.fromkeys(PrecisionName, torch.float32) | {PrecisionName.float64: torch.float64}
"""Type of model and data; bfloat16 is the type of autocast only."""


def prepare(config: Config, placement: DevicePlacement) -> Trainer:
    """Makes the trainer; every rank derives the same data, partition and model."""
    device, dtype = placement.device, DTYPES[config.precision]
    dataset = datasets.load(config.data, config.seed)
    labels = dataset.labels_N[dataset.train]
    parts = partition.split(labels, config.clients, config.partition, config.seed)
    indices = [dataset.train[part] for part in parts]
    shift = shift_of(config.partition, config.clients)
    store = ClientStore(dataset, indices, device, dtype, shift, config.seed)
    model = network(config, dataset.shape, dataset.classes).to(device, dtype)
    described = structure.described(named_tensors(model))
    structure.agree("models", "the start of training", described, None, device)
    collectives.broadcast_tensors(model_tensors(model))
    one_each, batch = _one_client_per_rank(config, store), store.example(config.batch_size)
    cohort = host(config, model, store.dummy(), placement.ranks_per_device, one_each, batch)
    evaluator = Evaluator(model, dataset, store, cohort.states, config)
    return Trainer(config=config, store=store, cohort=cohort, evaluator=evaluator)


def _one_client_per_rank(config: Config, store: ClientStore) -> bool:
    """Returns the same on every rank: compiled and eager ranks must not meet in a step."""
    per_round = config.clients_per_round or config.clients
    return per_round == process_group.world_size() and min(store.sizes) >= config.batch_size


def host(
    config: Config,
    model: nn.Module,
    dummy: Samples,
    ranks_per_device: int = 1,
    one_client_per_rank: bool = False,
    example: Samples | None = None,
) -> Cohort:
    """Makes the cohort, which trains ``model`` with the clients of this rank.

    Args:
        config: the options of the job.
        model: the global model, with the algorithm's normalization layers.
        dummy: a single sample, for ranks without a client.
        ranks_per_device: ranks that share the device's memory.
        one_client_per_rank: whether every rank has one client with whole batches in every round.
        example: a batch like those of the clients; only needed if steps are compiled.
    """
    loss = Loss.of(config)
    if config.compile:
        assert example is not None, "steps are compiled for batches like an example"
        plans = plan(config, 1), plan(config, config.rounds)
        synchronised = one_client_per_rank and plans[0].synchronised_steps > 0
        local = [each for each in plans if each.synchronised_steps < config.local_steps]
        loss = compile_step.compiled(loss, model, example, local, synchronised)
    private = ALGORITHMS[config.algorithm.name].private
    budget = MemoryBudget(model, dummy, config, ranks_per_device)
    states = PrivateStates(model, private, budget.leaves_room_for)
    models = ClientModels(model, config, loss, states)
    untrained = {ParameterGroup.statistics, ParameterGroup.buffers}
    trained = TensorFilter(model, set(ParameterGroup) - untrained - private)
    server = ServerOptimizer(config.server, trained)
    return Cohort(models, server, make_runners(models, dummy, budget, one_client_per_rank))


def network(config: Config, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Makes the network for samples of ``shape`` (C, H, W), with the algorithm's norm layers."""
    algorithm = ALGORITHMS[config.algorithm.name]
    model = factory.build(config.model, shape, classes, config.seed)
    model = convert_batchnorm(with_norm_of(config, model))
    if algorithm.normaliser is Normaliser.running:
        model = normalise_by_running(model, algorithm.mixes)
    if config.channels_last and config.precision is not PrecisionName.float64:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
