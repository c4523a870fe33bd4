"""Augmentation: random parameters, and the vectorised step against a loop over samples."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from fedtan_hpc.config.schema import DataConfig
from fedtan_hpc.data.augmentation import Augmentation, AugmentationParams, augmentation_of

STEPS, BATCH, PADDING = 3, 7, 2
BOTH = Augmentation(flip=True, crop_padding=PADDING)


def drawn(
    augmentation: Augmentation = BOTH,
    seed: int = 0,
    client: int = 1,
    round_number: int = 2,
    steps: int = STEPS,
    batch_size: int = BATCH,
) -> AugmentationParams:
    generators = augmentation.generators(seed, client, round_number)
    return augmentation.draw(generators, steps, batch_size)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, 3, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def tensors(decisions: AugmentationParams) -> tuple[Tensor, Tensor]:
    assert decisions.flips_EB is not None
    assert decisions.offsets_EB2 is not None
    return decisions.flips_EB, decisions.offsets_EB2


def by_hand(image: npt.NDArray[np.float32], flip: bool, top: int, left: int) -> Tensor:
    """Flips and crops one sample (C, H, W) with numpy."""
    if flip:
        image = image[:, :, ::-1]
    padded = np.pad(image, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    return torch.from_numpy(padded[:, top : top + 6, left : left + 8].copy())


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("crop", [True, False])
def test_a_step_is_the_plain_loop_over_samples(flip: bool, crop: bool) -> None:
    decisions = drawn(Augmentation(flip, PADDING if crop else 0))
    flips, offsets = tensors(drawn())
    for step in range(STEPS):
        loop = [
            by_hand(
                image.numpy(),
                flip and bool(flips[step, place]),
                int(offsets[step, place, 0]) if crop else PADDING,
                int(offsets[step, place, 1]) if crop else PADDING,
            )
            for place, image in enumerate(inputs())
        ]
        augmented = decisions.apply(step, inputs())
        assert torch.equal(augmented, torch.stack(loop))
        assert augmented.is_contiguous()


def test_both_are_drawn_evenly() -> None:
    flips, offsets = tensors(drawn(steps=100, batch_size=100))
    assert flips.shape == (100, 100)
    assert flips.dtype == torch.bool
    assert float(flips.double().mean()) == pytest.approx(0.5, abs=0.02)
    assert offsets.shape == (100, 100, 2)
    for axis in (0, 1):
        shares = torch.bincount(offsets[..., axis].flatten()) / 10_000
        assert shares.tolist() == pytest.approx([0.2] * (2 * PADDING + 1), abs=0.02)


def test_decisions_depend_on_seed_client_and_round_alone() -> None:
    assert all(torch.equal(*pair) for pair in zip(tensors(drawn()), tensors(drawn()), strict=True))
    for others in (drawn(seed=1), drawn(client=0), drawn(round_number=3)):
        for one, other in zip(tensors(drawn()), tensors(others), strict=True):
            assert not torch.equal(one, other)


def test_flips_stay_the_same_without_crops_and_crops_without_flips() -> None:
    flips, offsets = tensors(drawn())
    alone = drawn(Augmentation(flip=True, crop_padding=0))
    assert alone.offsets_EB2 is None
    assert torch.equal(flips, alone.flips_EB)  # type: ignore[arg-type]
    alone = drawn(Augmentation(flip=False, crop_padding=PADDING))
    assert alone.flips_EB is None
    assert torch.equal(offsets, alone.offsets_EB2)  # type: ignore[arg-type]


def test_how_samples_are_grouped_makes_no_difference() -> None:
    decisions = drawn()
    flips, offsets = tensors(decisions)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))
    whole = decisions.apply(1, inputs())
    pieces = [
        AugmentationParams(PADDING, flips[1:2, chosen], offsets[1:2, chosen]).apply(
            0, inputs()[chosen]
        )
        for chosen in order.split(3)
    ]
    assert torch.equal(torch.cat(pieces), whole[order])


def test_nothing_else_changes() -> None:
    before = inputs(torch.float64)
    given = before.clone()
    augmented = drawn().apply(0, given)
    assert torch.equal(given, before)
    assert augmented.dtype == torch.float64
    assert augmented.shape == before.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_gives_the_same_bits() -> None:
    device = torch.device("cuda")
    augmented = drawn().to(device).apply(2, inputs().to(device))
    assert torch.equal(augmented.cpu(), drawn().apply(2, inputs()))


def test_options_that_ask_for_nothing_give_none() -> None:
    assert augmentation_of(DataConfig()) is None
    assert augmentation_of(DataConfig(flip=True)) == Augmentation(True, 0)
    assert augmentation_of(DataConfig(crop_padding=4)) == Augmentation(False, 4)
