"""Feature shift: each client's inputs do not depend on the rank or the grouping of samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtan_hpc.config.enums import PartitionName, ShiftName
from fedtan_hpc.config.schema import PartitionConfig
from fedtan_hpc.data.feature_shift import Shift, clients_of_test, rotate, shift_of

ROTATION = Shift(ShiftName.rotation, 90.0, 5)
INTENSITY = Shift(ShiftName.intensity, 4.0, 5)


def inputs(height: int = 6, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(9, 2, height, width, generator=generator, dtype=torch.float64)


def test_angles_and_factors_are_evenly_spaced() -> None:
    assert [ROTATION.amount(k) for k in range(5)] == [-90, -45, 0, 45, 90]
    assert [INTENSITY.amount(k) for k in range(5)] == pytest.approx([0.25, 0.5, 1, 2, 4])
    assert Shift(ShiftName.rotation, 30.0, 1).amount(0) == 0
    assert Shift(ShiftName.intensity, 3.0, 1).amount(0) == 1


@pytest.mark.parametrize("turns", [-1, 0, 1, 2])
def test_right_angles_turn_counter_clockwise(turns: int) -> None:
    turned = rotate(inputs(), 90.0 * turns)
    torch.testing.assert_close(turned, torch.rot90(inputs(), turns, (2, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_any_angle_is_bilinear_with_the_borders_values_outside(size: tuple[int, int]) -> None:
    """Compares with a rotation of the pixel coordinates, point by point."""
    height, width = size
    images, degrees = inputs(*size), 25.0
    turned = rotate(images, degrees)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for y in range(height):
        for x in range(width):
            right, up = x - (width - 1) / 2, (height - 1) / 2 - y
            # the point that a turn by +degrees brings here
            from_x = min(max(cos * right + sin * up + (width - 1) / 2, 0), width - 1)
            from_y = min(max((height - 1) / 2 - (cos * up - sin * right), 0), height - 1)
            left, top = min(int(from_x), width - 2), min(int(from_y), height - 2)
            a, b = from_x - left, from_y - top
            corner = images[:, :, top : top + 2, left : left + 2]
            weights = torch.tensor([[(1 - b) * (1 - a), (1 - b) * a], [b * (1 - a), b * a]])
            expected = (corner * weights.double()).sum((2, 3))
            torch.testing.assert_close(turned[:, :, y, x], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shift", [ROTATION, INTENSITY], ids=lambda shift: str(shift.kind))
def test_every_client_sees_the_same_whenever_it_looks(shift: Shift) -> None:
    before = inputs().float()
    given = before.clone()
    for client in range(5):
        seen = shift.apply(given, client)
        assert seen.shape == given.shape
        assert seen.dtype == torch.float32
        assert torch.equal(seen, shift.apply(given, client))
        assert torch.equal(seen[3:5], shift.apply(given[3:5], client))
        assert torch.equal(seen, before) == (client == 2)
    assert torch.equal(given, before)


@pytest.mark.parametrize("shift", [ROTATION, INTENSITY], ids=lambda shift: str(shift.kind))
def test_mixed_samples_are_seen_by_the_clients_they_are_dealt_to(shift: Shift) -> None:
    clients = clients_of_test(9, 5, seed=0)
    mixed = shift.apply_mixed(inputs(), clients)
    for place, client in enumerate(clients):
        assert torch.equal(mixed[place], shift.apply(inputs(), int(client))[place])


def test_test_samples_are_dealt_out_evenly_by_seed() -> None:
    dealt = clients_of_test(103, 5, seed=0)
    assert sorted(np.bincount(dealt)) == [20, 20, 21, 21, 21]
    assert np.array_equal(dealt, clients_of_test(103, 5, seed=0))
    assert not np.array_equal(dealt, clients_of_test(103, 5, seed=1))
    assert dealt.dtype == np.int64


def test_options_make_a_shift_with_feature_shift_only() -> None:
    assert shift_of(PartitionConfig(), 5) is None
    config = PartitionConfig(name=PartitionName.feature_shift)
    assert shift_of(config, 5) == Shift(ShiftName.rotation, 45.0, 5)
    config.shift = ShiftName.intensity
    assert shift_of(config, 3) == Shift(ShiftName.intensity, 2.0, 3)
    config.strength = 1.0
    assert shift_of(config, 3) == Shift(ShiftName.intensity, 1.0, 3)
