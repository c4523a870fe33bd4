"""Test sets, and partitions of the training samples among the clients.

They follow from the labels, the number of clients and a seed.  A partition is one ascending index
array for each client.  Together the arrays contain every sample exactly once, and every client has
at least ``MINIMUM_SAMPLES``.  Used by ``datasets``.  Shapes: N training samples.
"""

import heapq
import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..config.dataset_info import MINIMUM_SAMPLES, TEST_SHARE
from ..config.enums import PartitionName
from ..config.schema import DataConfig, PartitionConfig
from ..runtime import random_streams

Indices: TypeAlias = npt.NDArray[np.int64]


def split(labels_N: Indices, clients: int, config: PartitionConfig, seed: int) -> list[Indices]:
    """Divides the samples as ``config`` says; with feature_shift as with iid."""
    if config.name is PartitionName.shards:
        classes_per_client = config.shard_classes(clients, len(np.unique(labels_N)))
        return shards(labels_N, clients, classes_per_client, seed)
    if config.name is PartitionName.dirichlet:
        return dirichlet(labels_N, clients, config.alpha or 0.5, seed)
    if config.name is PartitionName.quantity:
        return quantity(len(labels_N), clients, config.alpha or 0.5, seed)
    return iid(len(labels_N), clients, seed)


def iid(samples: int, clients: int, seed: int) -> list[Indices]:
    """Divides shuffled samples into sizes that differ by at most one."""
    order = random_streams.generator(random_streams.IID, seed).permutation(samples)
    return [np.sort(part) for part in np.array_split(order, clients)]


def shards(labels_N: Indices, clients: int, classes_per_client: int, seed: int) -> list[Indices]:
    """Gives each client samples of a few classes (McMahan et al. 2017; FedTAN's non-i.i.d. data).

    Client after client gets the next ``classes_per_client`` classes, cyclically.  The clients of a
    class divide its samples evenly.  With 5 clients x 2 classes of 10, client 0 has the classes 0
    and 1, client 1 the classes 2 and 3, and so on.
    """
    rng = random_streams.generator(random_streams.SHARDS, seed)
    classes = np.unique(labels_N)
    slots = np.arange(clients * classes_per_client)
    pieces: list[list[Indices]] = [[] for _ in range(clients)]
    for number, label in enumerate(classes):
        owners = slots[slots % len(classes) == number] // classes_per_client
        members = rng.permutation(np.flatnonzero(labels_N == label))
        for owner, piece in zip(owners, np.array_split(members, len(owners)), strict=True):
            pieces[owner].append(piece)
    return _with_minimum(pieces)


def dirichlet(labels_N: Indices, clients: int, alpha: float, seed: int) -> list[Indices]:
    """Divides each class in proportions drawn from Dirichlet(alpha) (Hsu et al. 2019)."""
    rng = random_streams.generator(random_streams.DIRICHLET, seed)
    pieces: list[list[Indices]] = [[] for _ in range(clients)]
    for label in np.unique(labels_N):
        members = rng.permutation(np.flatnonzero(labels_N == label))
        ends = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members)
        for client, piece in enumerate(np.split(members, ends.round().astype(int))):
            pieces[client].append(piece)
    return _with_minimum(pieces)


def quantity(samples: int, clients: int, alpha: float, seed: int) -> list[Indices]:
    """Divides shuffled samples into sizes drawn from Dirichlet(alpha) (Li et al. 2022, NIID-Bench).

    The proportions apply to the samples that remain after each client gets ``MINIMUM_SAMPLES``.
    """
    rng = random_streams.generator(random_streams.QUANTITY, seed)
    shares = rng.dirichlet(np.full(clients, alpha))[:-1]
    ends = np.cumsum(shares) * (samples - clients * MINIMUM_SAMPLES)
    ends = ends.round().astype(int) + MINIMUM_SAMPLES * np.arange(1, clients)
    return [np.sort(part) for part in np.split(rng.permutation(samples), ends)]


def _with_minimum(pieces: list[list[Indices]]) -> list[Indices]:
    """Joins each client's pieces; moves samples from the largest clients to those with too few.

    Of equally large clients the first gives.
    """
    parts = [np.concatenate(arrays) for arrays in pieces]
    largest = [(-len(part), client) for client, part in enumerate(parts)]
    heapq.heapify(largest)
    for client, part in enumerate(parts):
        for _ in range(len(part), MINIMUM_SAMPLES):
            while len(parts[largest[0][1]]) != -largest[0][0]:  # outdated: it received samples
                heapq.heappop(largest)
            negative_size, giver = largest[0]
            parts[client] = np.append(parts[client], parts[giver][-1])
            parts[giver] = parts[giver][:-1]
            heapq.heapreplace(largest, (negative_size + 1, giver))
    return [np.sort(part) for part in parts]


def split_test(labels_N: Indices, seed: int) -> tuple[Indices, Indices]:
    """Returns 80 % of the samples for training and 20 % for the test, stratified by class.

    They are not stratified if there are too few samples for that.
    """
    from sklearn.model_selection import train_test_split

    _, counts = np.unique(labels_N, return_counts=True)
    can_stratify = counts.min() > 1 and math.ceil(TEST_SHARE * len(labels_N)) >= len(counts)
    train, test = train_test_split(
        np.arange(len(labels_N)),
        test_size=TEST_SHARE,
        stratify=labels_N if can_stratify else None,
        random_state=seed,
    )
    return np.sort(train), np.sort(test)


def subsets(
    config: DataConfig, labels_N: Indices, train: Indices, test: Indices, seed: int
) -> tuple[Indices, Indices]:
    """Returns as many of the training and test samples as ``config`` asks for."""
    if config.train_samples is not None:
        rng = random_streams.generator(random_streams.TRAIN_SUBSET, seed)
        train = train[_stratified(labels_N[train], config.train_samples, rng)]
    if config.test_samples is not None:
        rng = random_streams.generator(random_streams.TEST_SUBSET, seed)
        test = test[_stratified(labels_N[test], config.test_samples, rng)]
    return train, test


def _stratified(labels_N: Indices, size: int, rng: np.random.Generator) -> Indices:
    """Draws ``size`` ascending indices; each class keeps its fraction as closely as possible.

    Class sizes are rounded down, and the classes with the largest remainders get one more.  If
    ``size`` allows it, a class without samples then gets one from the largest class.
    """
    classes, counts = np.unique(labels_N, return_counts=True)
    sizes, remainders = np.divmod(size * counts, len(labels_N))
    sizes[np.argsort(-remainders, kind="stable")[: size - sizes.sum()]] += 1
    for empty in np.flatnonzero(sizes == 0) if size >= len(classes) else ():
        sizes[np.argmax(sizes)] -= 1
        sizes[empty] += 1
    members = (np.flatnonzero(labels_N == label) for label in classes)
    drawn = [rng.permutation(m)[:wanted] for m, wanted in zip(members, sizes, strict=True)]
    return np.sort(np.concatenate(drawn))
