"""From the options to a trainer: data, partition, model and the rank's share of the test set."""

from __future__ import annotations

import torch

from . import comm, data, models, partition
from .algorithms import ALGORITHMS
from .average import model_tensors
from .batchnorm import convert_batchnorm
from .clients import ClientStore
from .cohort import Cohort
from .config import Config, PrecisionName
from .device import Place
from .local_training import LocalTraining
from .trainer import Trainer

DTYPES = {PrecisionName.float32: torch.float32, PrecisionName.float64: torch.float64}


def prepare(config: Config, place: Place, ranks_here: int = 1) -> Trainer:
    """Every rank derives the same data, partition and model; samples come as clients do.

    ``ranks_here`` ranks share this machine's memory.
    """
    dtype = DTYPES[config.precision]
    dataset = data.load(config.data, config.seed)
    labels = dataset.labels_N[dataset.train]
    parts = partition.split(labels, config.clients, config.partition, config.seed)
    store = ClientStore(dataset, [dataset.train[part] for part in parts], place.device, dtype)
    model = models.build(config.model, dataset.shape, dataset.classes, config.seed)
    model = convert_batchnorm(model).to(place.device, dtype)
    comm.broadcast_tensors(model_tensors(model))
    training = LocalTraining(
        algorithm=ALGORITHMS[config.algorithm.name],
        local_steps=config.local_steps,
        batch_size=config.batch_size,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
        seed=config.seed,
    )
    share = dataset.test[comm.rank() :: comm.world_size()]
    return Trainer(
        config=config,
        store=store,
        cohort=Cohort(model, training, store.dummy(), config.cohort, ranks_here),
        test_share=dataset.take(share).to(place.device, dtype),
    )
