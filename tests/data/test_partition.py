"""Partitions: every sample once, enough for every client, and the promised distribution."""

from __future__ import annotations

import numpy as np
import pytest

from fedtan_hpc.config.enums import PartitionName
from fedtan_hpc.config.schema import PartitionConfig
from fedtan_hpc.data import partition
from fedtan_hpc.data.partition import Indices

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 40))
CLIENTS = (1, 2, 3, 5, 7, 20, 100)


def of_kind(name: str, clients: int, seed: int = 0, **options: float) -> list[Indices]:
    config = PartitionConfig(name=PartitionName(name), **options)  # type: ignore[arg-type]
    return partition.split(LABELS, clients, config, seed)


@pytest.mark.parametrize("clients", CLIENTS)
@pytest.mark.parametrize("name", [str(name) for name in PartitionName])
def test_every_sample_is_held_once_and_every_client_has_enough(name: str, clients: int) -> None:
    parts = of_kind(name, clients)
    assert len(parts) == clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))
    assert min(len(part) for part in parts) >= 2
    assert all(np.array_equal(part, np.sort(part)) for part in parts)


@pytest.mark.parametrize("name", [str(name) for name in PartitionName])
def test_a_seed_gives_one_partition_and_another_seed_another(name: str) -> None:
    first, again, other = (np.concatenate(of_kind(name, 20, seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_iid_clients_differ_by_one_sample_at_most() -> None:
    sizes = [len(part) for part in of_kind("iid", 7)]
    assert max(sizes) - min(sizes) <= 1


def test_the_papers_shards_are_two_classes_each_without_overlap() -> None:
    held = [set(LABELS[part]) for part in of_kind("shards", 5)]
    assert held == [{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}]


@pytest.mark.parametrize(("clients", "classes"), [(5, 2), (10, 3), (3, 4), (100, 2), (1, 10)])
def test_shards_hold_as_many_classes_as_asked(clients: int, classes: int) -> None:
    for part in of_kind("shards", clients, classes_per_client=classes):
        assert len(set(LABELS[part])) == classes


def test_shards_default_to_what_shares_all_classes_out() -> None:
    assert [len(set(LABELS[part])) for part in of_kind("shards", 3)] == [4, 4, 4]


def test_a_small_alpha_is_more_uneven_than_a_large_one() -> None:
    def unevenness(alpha: float) -> float:
        parts = of_kind("dirichlet", 5, alpha=alpha)
        shares = np.array([np.bincount(LABELS[part], minlength=10) for part in parts]) / 40
        return float(shares.std())

    assert unevenness(0.05) > 2 * unevenness(10.0)


def test_quantity_gives_uneven_sizes_of_the_same_mix() -> None:
    sizes = {
        alpha: [len(part) for part in of_kind("quantity", 5, alpha=alpha)] for alpha in (0.1, 1e4)
    }
    assert np.std(sizes[0.1]) > 10 * np.std(sizes[1e4])
    assert max(sizes[1e4]) < 90
    largest = max(of_kind("quantity", 5, alpha=0.5), key=len)
    shares = np.bincount(LABELS[largest], minlength=10) / len(largest)
    assert shares.max() < 0.2


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1e6])
@pytest.mark.parametrize("clients", [1, 199, 200])
def test_quantity_leaves_every_client_its_least(clients: int, alpha: float) -> None:
    parts = of_kind("quantity", clients, alpha=alpha)
    assert min(len(part) for part in parts) >= 2
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))


def test_a_feature_shift_has_nothing_to_do_with_labels() -> None:
    pairs = zip(of_kind("feature_shift", 7), of_kind("iid", 7), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)
