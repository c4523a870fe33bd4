"""Who holds which training sample: pure functions of the labels, the clients and a seed.

Each returns one ascending index array per client; together they hold every sample exactly once,
and every client holds at least ``MINIMUM_SAMPLES``.  N samples.
"""

from __future__ import annotations

import heapq
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..runtime import random_streams
from ..config.enums import PartitionName
from ..config.schema import PartitionConfig
from ..config.dataset_info import MINIMUM_SAMPLES

Indices: TypeAlias = npt.NDArray[np.int64]


def split(labels_N: Indices, clients: int, config: PartitionConfig, seed: int) -> list[Indices]:
    """Share the samples out as ``config`` says; feature_shift is iid, the shift is ``shift``'s."""
    if config.name is PartitionName.shards:
        held = config.classes_held(clients, len(np.unique(labels_N)))
        return shards(labels_N, clients, held, seed)
    if config.name is PartitionName.dirichlet:
        return dirichlet(labels_N, clients, config.alpha or 0.5, seed)
    if config.name is PartitionName.quantity:
        return quantity(len(labels_N), clients, config.alpha or 0.5, seed)
    return iid(len(labels_N), clients, seed)


def iid(samples: int, clients: int, seed: int) -> list[Indices]:
    """Shuffled and dealt out; sizes differ by one at most."""
    order = random_streams.generator(random_streams.IID, seed).permutation(samples)
    return [np.sort(part) for part in np.array_split(order, clients)]


def shards(labels_N: Indices, clients: int, classes_per_client: int, seed: int) -> list[Indices]:
    """Contiguous pieces of the samples sorted by label (McMahan et al. 2017; FedTAN's non-i.i.d.).

    Going round the classes, client k holds the next ``classes_per_client`` of them, and the
    clients that hold a class share its samples out evenly: 5 clients x 2 classes of 10 gives
    client 0 the classes 0 and 1, client 1 the classes 2 and 3, and so on.
    """
    rng = random_streams.generator(random_streams.SHARDS, seed)
    classes = np.unique(labels_N)
    slots = np.arange(clients * classes_per_client)
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for place, label in enumerate(classes):
        owners = slots[slots % len(classes) == place] // classes_per_client
        members = rng.permutation(np.flatnonzero(labels_N == label))
        for owner, piece in zip(owners, np.array_split(members, len(owners)), strict=True):
            parts[owner].append(piece)
    return _with_minimum([np.concatenate(pieces) for pieces in parts])


def dirichlet(labels_N: Indices, clients: int, alpha: float, seed: int) -> list[Indices]:
    """Each class is shared out in proportions drawn from Dirichlet(alpha) (Hsu et al. 2019)."""
    rng = random_streams.generator(random_streams.DIRICHLET, seed)
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for label in np.unique(labels_N):
        members = rng.permutation(np.flatnonzero(labels_N == label))
        ends = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members)
        for part, piece in zip(parts, np.split(members, ends.round().astype(int)), strict=True):
            part.append(piece)
    return _with_minimum([np.concatenate(pieces) for pieces in parts])


def quantity(samples: int, clients: int, alpha: float, seed: int) -> list[Indices]:
    """Shuffled; sizes in proportions drawn from Dirichlet(alpha) (Li et al. 2022, NIID-Bench).

    The proportions are of what is left after each client has its ``MINIMUM_SAMPLES``.
    """
    rng = random_streams.generator(random_streams.QUANTITY, seed)
    shares = rng.dirichlet(np.full(clients, alpha))[:-1]
    ends = np.cumsum(shares) * (samples - clients * MINIMUM_SAMPLES)
    ends = ends.round().astype(int) + MINIMUM_SAMPLES * np.arange(1, clients)
    return [np.sort(part) for part in np.split(rng.permutation(samples), ends)]


def _with_minimum(parts: list[Indices]) -> list[Indices]:
    """Give clients with too few samples some of whoever then has most, the first of equals."""
    richest = [(-len(part), client) for client, part in enumerate(parts)]
    heapq.heapify(richest)
    for client, part in enumerate(parts):
        for _ in range(len(part), MINIMUM_SAMPLES):
            while len(parts[richest[0][1]]) != -richest[0][0]:  # has been given some
                heapq.heappop(richest)
            size, giver = richest[0]
            parts[client] = np.append(parts[client], parts[giver][-1])
            parts[giver] = parts[giver][:-1]
            heapq.heapreplace(richest, (size + 1, giver))
    return [np.sort(part) for part in parts]
