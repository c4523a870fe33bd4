"""From the options to a trainer: data, partition, model and the client of this rank."""

from __future__ import annotations

from . import comm, data, models, partition
from .algorithms import ALGORITHMS
from .average import model_tensors
from .batchnorm import convert_batchnorm
from .cohort import Client, LocalTraining
from .config import Config
from .data import Dataset
from .device import Place
from .environment import RankInfo
from .trainer import Trainer


def prepare(config: Config, info: RankInfo, place: Place) -> Trainer:
    """Every rank derives the same data, partition and model, and keeps its share of the samples."""
    dataset = data.load(config.data, config.seed)
    model = models.build(config.model, dataset.shape, dataset.classes, config.seed)
    model = convert_batchnorm(model).to(place.device)
    comm.broadcast_tensors(model_tensors(model))
    return Trainer(
        config=config,
        model=model,
        client=_client(config, dataset, info.rank, place),
        training=LocalTraining(
            algorithm=ALGORITHMS[config.algorithm.name],
            local_steps=config.local_steps,
            batch_size=config.batch_size,
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
            seed=config.seed,
        ),
        test_share=dataset.take(dataset.test[info.rank :: info.world_size]).to(place.device),
    )


def _client(config: Config, dataset: Dataset, number: int, place: Place) -> Client:
    labels = dataset.labels_N[dataset.train]
    mine = partition.split(labels, config.clients, config.partition, config.seed)[number]
    samples = dataset.take(dataset.train[mine]).to(place.device)
    return Client(number, weight=len(mine) / len(labels), samples=samples)
