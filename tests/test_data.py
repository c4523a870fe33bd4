"""Data sets and batches: the split, what a seed fixes, and what each sample depends on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtan_hpc import data
from fedtan_hpc.config import DataConfig, DataName

SYNTHETIC = DataConfig(name=DataName.synthetic, samples=200, shape=[2, 4, 5], classes=4)


@pytest.mark.parametrize("config", [DataConfig(), SYNTHETIC])
def test_split_is_stratified_and_covers_everything_once(config: DataConfig) -> None:
    dataset = data.load(config, seed=0)
    samples, shape, classes = config.facts()
    assert (len(dataset.labels_N), dataset.shape, dataset.classes) == (samples, shape, classes)
    both = np.sort(np.concatenate([dataset.train, dataset.test]))
    assert np.array_equal(both, np.arange(samples))
    assert len(dataset.test) == pytest.approx(0.2 * samples, abs=1)
    shares = np.bincount(dataset.labels_N[dataset.test]) / np.bincount(dataset.labels_N)
    assert shares.min() > 0.18
    assert shares.max() < 0.22


@pytest.mark.parametrize("config", [DataConfig(), SYNTHETIC])
def test_seed_fixes_the_split(config: DataConfig) -> None:
    first, again, other = (data.load(config, seed).test for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_digits_are_the_real_ones_standardised_on_the_training_part() -> None:
    dataset = data.load(DataConfig(), seed=0)
    train = dataset.take(dataset.train)
    assert train.inputs.shape == (1437, 1, 8, 8)
    assert train.inputs.dtype == torch.float32
    assert abs(float(train.inputs.double().mean())) < 1e-6
    assert float(train.inputs.double().std()) == pytest.approx(1, abs=1e-4)
    assert sorted(train.labels.unique().tolist()) == list(range(10))


def test_a_synthetic_sample_does_not_depend_on_who_asks() -> None:
    dataset = data.load(SYNTHETIC, seed=0)
    whole = dataset.take(np.arange(200))
    part = dataset.take(np.array([17, 3]))
    assert torch.equal(part.inputs, whole.inputs[[17, 3]])
    assert torch.equal(part.labels, whole.labels[[17, 3]])


def test_synthetic_classes_have_means_of_their_own() -> None:
    samples = data.load(SYNTHETIC, seed=0).take(np.arange(200))
    means = torch.stack([samples.inputs[samples.labels == c].mean((0, 2, 3)) for c in range(4)])
    assert float((means[0] - means[1:]).norm(dim=1).min()) > 0.2


def batch(client: int = 0, round_number: int = 1, seed: int = 0, size: int = 4) -> torch.Tensor:
    return data.batch_indices(10, size, 5, seed, client, round_number)


def test_batches_depend_on_seed_client_and_round_alone() -> None:
    assert torch.equal(batch(), batch())
    others = (batch(client=1), batch(round_number=2), batch(seed=1))
    assert not any(torch.equal(batch(), other) for other in others)


def test_a_pass_over_the_samples_repeats_none() -> None:
    indices = batch()
    assert indices.shape == (5, 4)
    for start in (0, 2):
        assert len(indices[start : start + 2].unique()) == 8


def test_a_client_smaller_than_a_batch_uses_all_it_has() -> None:
    indices = batch(size=32)
    assert indices.shape == (5, 10)
    assert all(sorted(row.tolist()) == list(range(10)) for row in indices)
