"""From the options to a trainer: data, partition, model and the rank's share of the test set."""

from __future__ import annotations

import torch
from torch import nn

from ..batchnorm.layer import convert_batchnorm
from ..batchnorm.running_norm import normalise_by_running
from ..config.algorithms import ALGORITHMS, Normaliser, ParameterGroup, plan
from ..config.enums import ModelSource, PrecisionName
from ..config.schema import Config
from ..data import batching, datasets, partition
from ..data.augmentation import augmentation_of
from ..data.client_store import ClientStore
from ..data.feature_shift import shift_of
from ..distributed import collectives, process_group
from ..distributed.model_average import model_tensors
from ..evaluation.evaluator import Evaluator
from ..models import factory
from ..models.norms import with_norm_of
from ..models.parameter_groups import TensorFilter
from ..runtime.device import DevicePlacement
from ..training import compile_step, vmap_clients
from ..training.client_state import PrivateStates
from ..training.cohort import Cohort, Stacking
from ..training.local_training import LocalTraining
from ..training.loss import Loss
from ..training.memory_budget import MemoryBudget
from ..training.server_optimizer import Server
from .trainer import Trainer

DTYPES = {
    PrecisionName.float32: torch.float32,
    PrecisionName.bfloat16: torch.float32,
    PrecisionName.float64: torch.float64,
}
"""Of model and data; with bfloat16 autocast has the rest."""


def prepare(config: Config, place: DevicePlacement) -> Trainer:
    """Every rank derives the same data, partition and model; samples come as clients do."""
    dtype = DTYPES[config.precision]
    dataset = datasets.load(config.data, config.seed)
    store = _store(config, dataset, place.device, dtype)
    model = network(config, dataset.shape, dataset.classes).to(place.device, dtype)
    collectives.broadcast_tensors(model_tensors(model))
    example = store.example(config.batch_size)
    one_client_per_rank = _one_each(config, store)
    cohort = host(
        config, model, store.dummy(), place.ranks_per_device, one_client_per_rank, example
    )
    judge = Evaluator(model, dataset, store, cohort.states, config)
    return Trainer(config=config, store=store, cohort=cohort, judge=judge)


def host(
    config: Config,
    model: nn.Module,
    dummy: batching.Samples,
    ranks_per_device: int = 1,
    one_client_per_rank: bool = False,
    example: batching.Samples | None = None,
) -> Cohort:
    """The part of a rank that trains ``model`` with its clients; ``dummy`` is a single sample.

    ``ranks_per_device`` ranks share the device's memory.
    ``one_client_per_rank``: every rank has one client in every round, and whole batches.  Steps are compiled
    for batches like ``example``.
    """
    loss = Loss(mixed=config.precision is PrecisionName.bfloat16)
    if config.compile:
        assert example is not None, "steps are compiled for batches like an example"
        plans = plan(config, 1), plan(config, config.rounds)
        synchronised = one_client_per_rank and plans[0].synchronised_steps > 0
        loss = compile_step.compiled(loss, model, example, plans, synchronised)
    training = LocalTraining(
        local_steps=config.local_steps,
        batch_size=config.batch_size,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
        seed=config.seed,
        proximal_mu=config.client.proximal_mu,
        sampling=config.sampling,
        augmentation=augmentation_of(config.data),
        loss=loss,
    )
    private = ALGORITHMS[config.algorithm.name].private
    budget = MemoryBudget(model, dummy, training, ranks_per_device)
    states = PrivateStates(model, private, budget.leaves_room_for)
    shared = TensorFilter(
        model, set(ParameterGroup) - {ParameterGroup.statistics, ParameterGroup.buffers} - private
    )
    server = Server(config.server, shared)
    stacking = _stacking(config, model, dummy)
    return Cohort(
        model, training, dummy, config.cohort, budget, states, server, stacking, one_client_per_rank
    )


def _one_each(config: Config, store: ClientStore) -> bool:
    """Known to every rank alike: compiled and eager ranks must not meet in a step."""
    drawn = config.clients_per_round or config.clients
    return drawn == process_group.world_size() and min(store.sizes) >= config.batch_size


def _stacking(config: Config, model: nn.Module, dummy: batching.Samples) -> Stacking:
    """How much is known of the model; to try it out takes a pass, which only a GPU repays."""
    if config.model.source is ModelSource.builtin:
        return Stacking.pays
    if not dummy.inputs.is_cuda or vmap_clients.vmap_error(model, dummy.inputs) is None:
        return Stacking.works
    return Stacking.fails


def _store(
    config: Config, dataset: datasets.Dataset, device: torch.device, dtype: torch.dtype
) -> ClientStore:
    labels = dataset.labels_N[dataset.train]
    parts = partition.split(labels, config.clients, config.partition, config.seed)
    held = [dataset.train[part] for part in parts]
    shift = shift_of(config.partition, config.clients)
    return ClientStore(dataset, held, device, dtype, shift, config.seed)


def network(config: Config, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network for samples of ``shape``, with the normalization layers of the algorithm."""
    algorithm = ALGORITHMS[config.algorithm.name]
    model = factory.build(config.model, shape, classes, config.seed)
    model = convert_batchnorm(with_norm_of(config, model))
    if algorithm.normaliser is Normaliser.running:
        model = normalise_by_running(model, algorithm.mixes)
    if config.channels_last and config.precision is not PrecisionName.float64:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
