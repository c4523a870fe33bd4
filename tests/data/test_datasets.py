"""Data sets and batches: the split, what the seed determines, what a sample depends on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtan_hpc.config.dataset_info import KNOWN_DATASETS, DatasetInfo
from fedtan_hpc.config.enums import DataName, NormalisationName, SamplingName
from fedtan_hpc.config.schema import DataConfig
from fedtan_hpc.data import datasets, image_files, partition
from fedtan_hpc.data.batching import BatchSampler, Dataset
from fedtan_hpc.data.image_files import Bytes

SYNTHETIC = DataConfig(name=DataName.synthetic, samples=200, shape=[2, 4, 5], classes=4)

FASHION = DataConfig(name=DataName.fashion_mnist)


@pytest.fixture(scope="module")
def fashion() -> Dataset:
    """Loads the real Fashion-MNIST, for example from Debian's package dataset-fashion-mnist."""
    if image_files.find(FASHION) is None:
        pytest.skip("Fashion-MNIST is not here: apt install dataset-fashion-mnist")
    return datasets.load(FASHION, seed=0)


@pytest.mark.parametrize("config", [DataConfig(), SYNTHETIC])
def test_split_is_stratified_and_covers_everything_once(config: DataConfig) -> None:
    dataset = datasets.load(config, seed=0)
    info = config.info()
    found = DatasetInfo(len(dataset.train), len(dataset.test), dataset.shape, dataset.classes)
    assert found == info
    samples = info.train + info.test
    assert len(dataset.labels_N) == samples
    both = np.sort(np.concatenate([dataset.train, dataset.test]))
    assert np.array_equal(both, np.arange(samples))
    assert len(dataset.test) == pytest.approx(0.2 * samples, abs=1)
    shares = np.bincount(dataset.labels_N[dataset.test]) / np.bincount(dataset.labels_N)
    assert shares.min() > 0.18
    assert shares.max() < 0.22


@pytest.mark.parametrize("config", [DataConfig(), SYNTHETIC])
def test_seed_fixes_the_split(config: DataConfig) -> None:
    first, again, other = (datasets.load(config, seed).test for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_digits_are_the_real_ones_standardised_on_the_training_part() -> None:
    dataset = datasets.load(DataConfig(), seed=0)
    train = dataset.take(dataset.train)
    assert train.inputs.shape == (1437, 1, 8, 8)
    assert train.inputs.dtype == torch.float32
    assert abs(float(train.inputs.double().mean())) < 1e-6
    assert float(train.inputs.double().std()) == pytest.approx(1, abs=1e-4)
    assert sorted(train.labels.unique().tolist()) == list(range(10))


def test_a_synthetic_sample_does_not_depend_on_who_asks() -> None:
    dataset = datasets.load(SYNTHETIC, seed=0)
    whole = dataset.take(np.arange(200))
    part = dataset.take(np.array([17, 3]))
    assert torch.equal(part.inputs, whole.inputs[[17, 3]])
    assert torch.equal(part.labels, whole.labels[[17, 3]])


def test_synthetic_classes_have_means_of_their_own() -> None:
    samples = datasets.load(SYNTHETIC, seed=0).take(np.arange(200))
    means = torch.stack([samples.inputs[samples.labels == c].mean((0, 2, 3)) for c in range(4)])
    assert float((means[0] - means[1:]).norm(dim=1).min()) > 0.2


def test_fashion_mnist_is_the_real_one(fashion: Dataset) -> None:
    assert np.array_equal(fashion.train, np.arange(60_000))
    assert np.array_equal(fashion.test, np.arange(60_000, 70_000))
    assert (fashion.shape, fashion.classes) == ((1, 28, 28), 10)
    assert fashion.labels_N[:5].tolist() == [9, 0, 0, 3, 0]
    assert fashion.labels_N[60_000:60_005].tolist() == [9, 2, 1, 1, 6]
    assert np.bincount(fashion.labels_N[fashion.train]).tolist() == [6000] * 10
    assert np.bincount(fashion.labels_N[fashion.test]).tolist() == [1000] * 10


def test_fashion_mnist_is_standardised_by_its_training_pixels(fashion: Dataset) -> None:
    """The known moments of Fashion-MNIST in 0 to 1 are mean 0.2860 and deviation 0.3530."""
    black, white = -0.2860 / 0.3530, (1 - 0.2860) / 0.3530
    first = fashion.take(np.arange(1))
    assert first.inputs.dtype == torch.float32
    assert float(first.inputs.min()) == pytest.approx(black, abs=1e-3)
    assert float(first.inputs.max()) == pytest.approx(white, abs=1e-3)


def test_images_do_not_depend_on_who_asks(fashion: Dataset) -> None:
    whole, part = (
        fashion.read(np.arange(20), None).numpy(),
        fashion.read(np.array([17, 3]), None).numpy(),
    )
    assert np.array_equal(part, whole[[17, 3]])


def test_a_subset_of_images_is_all_that_is_kept(fashion: Dataset) -> None:
    config = DataConfig(name=DataName.fashion_mnist, train_samples=500, test_samples=101)
    dataset = datasets.load(config, seed=0)
    assert len(dataset.labels_N) == 601
    assert np.array_equal(dataset.train, np.arange(500))
    assert np.array_equal(dataset.test, np.arange(500, 601))
    assert np.bincount(dataset.labels_N[dataset.train]).tolist() == [50] * 10
    inputs = dataset.read(dataset.train, None).numpy()
    assert inputs.mean(dtype=np.float64) == pytest.approx(0, abs=1e-6)
    assert inputs.std(dtype=np.float64) == pytest.approx(1, abs=1e-6)


def colours(
    monkeypatch: pytest.MonkeyPatch, normalisation: NormalisationName, blue: int | None = None
) -> tuple[Bytes, Dataset]:
    """Returns a CIFAR-10 of 30 + 10 random images and its pixels; ``blue`` sets a whole channel."""
    pixels = np.random.default_rng(0).integers(256, size=(40, 3, 32, 32), dtype=np.uint8)
    pixels[30:] = 255
    if blue is not None:
        pixels[:, 2] = blue
    labels = np.arange(40) % 10
    small = DatasetInfo(30, 10, (3, 32, 32), 10)
    monkeypatch.setitem(KNOWN_DATASETS, DataName.cifar10, small)
    monkeypatch.setattr(image_files, "read", lambda config: (pixels, labels))
    config = DataConfig(name=DataName.cifar10, normalisation=normalisation)
    return pixels, datasets.load(config, seed=0)


def test_each_channel_has_the_mean_and_deviation_of_the_training_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels, dataset = colours(monkeypatch, NormalisationName.training)
    train = pixels[:30].astype(np.float64)
    mean = train.mean((0, 2, 3), keepdims=True)
    deviation = train.std((0, 2, 3), keepdims=True)
    inputs = dataset.read(np.arange(40), None).numpy()
    np.testing.assert_allclose(inputs, (pixels - mean) / deviation, rtol=1e-5, atol=1e-6)


def test_imagenets_mean_and_deviation_can_be_had_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    _, dataset = colours(monkeypatch, NormalisationName.imagenet)
    white = dataset.read(dataset.test[:1], None).numpy()[0, :, 0, 0]
    assert white.tolist() == pytest.approx([2.2489, 2.4286, 2.6400], abs=1e-4)


def test_a_channel_of_one_value_becomes_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    _, dataset = colours(monkeypatch, NormalisationName.training, blue=7)
    assert not dataset.read(dataset.train, None).numpy()[:, 2].any()


SUBSETS = [
    DataConfig(train_samples=100, test_samples=23),
    DataConfig(
        name=DataName.synthetic,
        samples=200,
        shape=[2, 4, 5],
        classes=4,
        train_samples=33,
        test_samples=7,
    ),
]


@pytest.mark.parametrize("config", SUBSETS)
def test_a_subset_is_of_the_split_and_keeps_the_classes_shares(config: DataConfig) -> None:
    whole = datasets.load(replace(config, train_samples=None, test_samples=None), seed=0)
    dataset = datasets.load(config, seed=0)
    for part, of in ((dataset.train, whole.train), (dataset.test, whole.test)):
        assert set(part) <= set(of)
        assert np.array_equal(part, np.unique(part))
        shares = np.bincount(whole.labels_N[of]) / len(of) * len(part)
        assert np.abs(np.bincount(dataset.labels_N[part]) - shares).max() < 1
    assert (len(dataset.train), len(dataset.test)) == config.info()[:2]


@pytest.mark.parametrize("config", SUBSETS)
def test_seed_fixes_the_subset(config: DataConfig) -> None:
    first, again, other = (datasets.load(config, seed).train for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_subset_has_every_class_if_it_can() -> None:
    labels = np.repeat(np.arange(4), [97, 1, 1, 1])
    for wanted, expected in ((4, [1, 1, 1, 1]), (10, [7, 1, 1, 1]), (100, [97, 1, 1, 1])):
        chosen = partition._stratified(labels, wanted, np.random.default_rng(0))
        assert np.bincount(labels[chosen]).tolist() == expected
    assert len(partition._stratified(labels, 2, np.random.default_rng(0))) == 2


def test_digits_of_a_subset_are_standardised_by_it() -> None:
    dataset = datasets.load(DataConfig(train_samples=200), seed=0)
    inputs = dataset.read(dataset.train, None).numpy()
    assert inputs.mean(dtype=np.float64) == pytest.approx(0, abs=1e-6)


def batch(client: int = 0, round_number: int = 1, seed: int = 0, size: int = 4) -> torch.Tensor:
    return next(BatchSampler(size, 5, seed).draw(10, client, round_number))


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


def with_replacement(samples: int = 10, client: int = 0, round_number: int = 1) -> torch.Tensor:
    sampler = BatchSampler(400, 5, 0, SamplingName.replacement)
    return next(sampler.draw(samples, client, round_number))


def test_batches_with_replacement_are_whole_and_even() -> None:
    indices = with_replacement()
    assert indices.shape == (5, 400)
    shares = torch.bincount(indices.flatten()) / 2000
    assert shares.tolist() == pytest.approx([0.1] * 10, abs=0.03)
    assert with_replacement(samples=3).unique().tolist() == [0, 1, 2]


def test_batches_with_replacement_depend_on_client_and_round() -> None:
    assert torch.equal(with_replacement(), with_replacement())
    assert not torch.equal(with_replacement(), with_replacement(client=1))
    assert not torch.equal(with_replacement(), with_replacement(round_number=2))
