"""What a client draws for its steps does not depend on how many steps are drawn at once."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from fedtan_hpc.config.enums import SamplingName
from fedtan_hpc.config.schema import Config, DataConfig
from fedtan_hpc.data import batching
from fedtan_hpc.data.batching import BatchSampler, Samples
from fedtan_hpc.data.client_store import Client
from fedtan_hpc.runtime import random_streams
from fedtan_hpc.training import local_step
from fedtan_hpc.training.local_step import LossMean

SAMPLES, BATCH, STEPS = 25, 10, 13


@pytest.mark.parametrize("drawn", [1, 40, 2**20])
def test_batches_are_those_of_one_long_order(drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_DRAWN", drawn)
    key = 3, 5, 7
    rng = random_streams.generator(random_streams.BATCHES, *key)
    order = np.concatenate([rng.permutation(SAMPLES)[:20] for _ in range(7)])
    pieces = [*BatchSampler(BATCH, STEPS, seed=3).draw(SAMPLES, 5, 7)]
    assert torch.equal(torch.cat(pieces), torch.from_numpy(order.reshape(-1, BATCH)[:STEPS]))
    rng = random_streams.generator(random_streams.REPLACEMENT, *key)
    whole = torch.from_numpy(rng.integers(SAMPLES, size=(STEPS, BATCH)))
    sampler = BatchSampler(BATCH, STEPS, 3, SamplingName.replacement)
    assert torch.equal(torch.cat([*sampler.draw(SAMPLES, 5, 7)]), whole)
    assert drawn > 40 or len(pieces) > 3


def test_seeds_and_changes_of_images_are_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(
        local_steps=STEPS, batch_size=BATCH, data=DataConfig(flip=True, crop_padding=2), seed=3
    )
    images = Samples(torch.zeros(SAMPLES, 1, 4, 4), torch.zeros(SAMPLES, dtype=torch.int64))
    client = Client(5, 1.0, images)
    [whole] = local_step._drawn(client, 7, config)
    monkeypatch.setattr(batching, "_DRAWN", 1)
    pieces = [*local_step._drawn(client, 7, config)]
    assert len(pieces) == 7
    assert whole.augmentation is not None
    flips = [piece.augmentation.flips_EB for piece in pieces if piece.augmentation]
    offsets = [piece.augmentation.offsets_EB2 for piece in pieces if piece.augmentation]
    assert torch.equal(torch.cat(flips), whole.augmentation.flips_EB)  # type: ignore[arg-type]
    assert torch.equal(torch.cat(offsets), whole.augmentation.offsets_EB2)  # type: ignore[arg-type]
    assert [seed for piece in pieces for seed in piece.layer_seeds] == [*whole.layer_seeds]
    rng = random_streams.generator(random_streams.CROPS, 3, 5, 7)
    expected = torch.from_numpy(rng.integers(5, size=(STEPS, BATCH, 2)))
    assert torch.equal(whole.augmentation.offsets_EB2, expected)  # type: ignore[arg-type]


def test_a_billion_steps_begin_at_once() -> None:
    for sampling in SamplingName:
        batches = BatchSampler(BATCH, 10**9, 0, sampling).draw(SAMPLES, 0, 1)
        assert all(len(piece) < 2**20 for piece in islice(batches, 2))


def test_kept_losses_do_not_grow_with_the_steps() -> None:
    losses, values = LossMean(), torch.arange(3000, dtype=torch.float32)
    for value in values:
        losses.add(value)
        assert len(losses._last) < 1024
    assert losses.count == 3000
    assert losses.mean().item() == values.double().mean().item()
    assert losses.mean().dtype == torch.float64
