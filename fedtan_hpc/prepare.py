"""From the options to a trainer: data, partition, model and the rank's share of the test set."""

from __future__ import annotations

import torch
from torch import nn

from . import comm, data, models, partition, stacked
from .algorithms import ALGORITHMS, Normaliser, Part
from .augment import augmentation_of
from .average import model_tensors
from .batchnorm import convert_batchnorm
from .choices import ModelSource, PrecisionName
from .clients import ClientStore
from .cohort import Cohort, Stacking
from .config import Config
from .device import Place
from .judge import Judge
from .local_training import LocalTraining
from .memory import Budget
from .norms import with_norm_of
from .parts import Selection
from .private import PrivateStates
from .running import normalise_by_running
from .server import Server
from .shift import shift_of
from .trainer import Trainer

DTYPES = {PrecisionName.float32: torch.float32, PrecisionName.float64: torch.float64}


def prepare(config: Config, place: Place, ranks_here: int = 1) -> Trainer:
    """Every rank derives the same data, partition and model; samples come as clients do.

    ``ranks_here`` ranks share this machine's memory.
    """
    dtype = DTYPES[config.precision]
    dataset = data.load(config.data, config.seed)
    store = _store(config, dataset, place.device, dtype)
    model = _model(config, dataset).to(place.device, dtype)
    comm.broadcast_tensors(model_tensors(model))
    cohort = host(config, model, store.dummy(), ranks_here)
    judge = Judge(model, dataset, store, cohort.states, config)
    return Trainer(config=config, store=store, cohort=cohort, judge=judge)


def host(config: Config, model: nn.Module, dummy: data.Samples, ranks_here: int = 1) -> Cohort:
    """The part of a rank that trains ``model`` with its clients; ``dummy`` is a single sample."""
    training = LocalTraining(
        local_steps=config.local_steps,
        batch_size=config.batch_size,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
        seed=config.seed,
        proximal_mu=config.client.proximal_mu,
        sampling=config.sampling,
        augmentation=augmentation_of(config.data),
    )
    private = ALGORITHMS[config.algorithm.name].private
    budget = Budget(model, dummy, training, ranks_here)
    states = PrivateStates(model, private, budget.leaves_room_for)
    shared = Selection(model, set(Part) - {Part.statistics, Part.buffers} - private)
    server = Server(config.server, shared)
    stacking = _stacking(config, model, dummy)
    return Cohort(model, training, dummy, config.cohort, budget, states, server, stacking)


def _stacking(config: Config, model: nn.Module, dummy: data.Samples) -> Stacking:
    """How much is known of the model; to try it out takes a pass, which only a GPU repays."""
    if config.model.source is ModelSource.builtin:
        return Stacking.pays
    if not dummy.inputs.is_cuda or stacked.why_not(model, dummy.inputs) is None:
        return Stacking.works
    return Stacking.fails


def _store(
    config: Config, dataset: data.Dataset, device: torch.device, dtype: torch.dtype
) -> ClientStore:
    labels = dataset.labels_N[dataset.train]
    parts = partition.split(labels, config.clients, config.partition, config.seed)
    held = [dataset.train[part] for part in parts]
    shift = shift_of(config.partition, config.clients)
    return ClientStore(dataset, held, device, dtype, shift, config.seed)


def _model(config: Config, dataset: data.Dataset) -> nn.Module:
    """The network with the normalization layers of the algorithm."""
    algorithm = ALGORITHMS[config.algorithm.name]
    model = models.build(config.model, dataset.shape, dataset.classes, config.seed)
    model = convert_batchnorm(with_norm_of(config, model))
    if algorithm.normaliser is Normaliser.running:
        model = normalise_by_running(model, algorithm.mixes)
    return model
