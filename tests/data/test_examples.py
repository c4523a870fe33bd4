"""Example data sets: sizes, classes, seeds, what the sites differ in, and a job on one of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedtan_hpc
from fedtan_hpc import FederatedData, cli
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.data.examples.shapes import CLASSES, shapes
from fedtan_hpc.data.examples.tabular import tabular
from fedtan_hpc.data.federated_data import load_own


def parts(data: FederatedData, half: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of each client; ``half`` 1 has its test samples."""
    assert data.clients is not None
    return [client[half].tensors for client in data.clients]


def same(one: FederatedData, other: FederatedData) -> bool:
    pairs = [(parts(one, half), parts(other, half)) for half in (0, 1)]
    return all(
        torch.equal(a, b)
        for left, right in pairs
        for x, y in zip(left, right, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_shapes_have_a_class_for_each_pixel() -> None:
    data = shapes(seed=0, samples=40, size=24, test=10)
    assert data.classes == len(CLASSES) == 4
    for half, count in ((0, 40), (1, 10)):
        for images, masks in parts(data, half):
            assert (images.shape, images.dtype) == ((count, 3, 24, 24), torch.uint8)
            assert (masks.shape, masks.dtype) == ((count, 24, 24), torch.int64)
            assert (masks.flatten(1) > 0).any(1).all()
            shares = masks.flatten().bincount(minlength=4) / masks.numel()
            assert shares[0] > 0.5
            assert shares[1:].min() > 0.01


def test_shapes_stand_out_from_the_background() -> None:
    for images, masks in parts(shapes(seed=0, clients=1, samples=20, shift=0.0)):
        grey = images.float().mean(1)
        for kind in range(1, 4):
            assert grey[masks == kind].mean() > grey[masks == 0].mean() + 60


@pytest.mark.parametrize("make", [partial(shapes, samples=20, test=5), tabular])
def test_the_seed_alone_decides_the_data(make: Any) -> None:
    before = torch.get_rng_state()
    assert same(make(seed=3), make(seed=3))
    assert not same(make(seed=3), make(seed=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_does_not_depend_on_the_number_of_others() -> None:
    few, many = shapes(0, clients=2, samples=3, test=2), shapes(0, clients=3, samples=6, test=4)
    for half, count in ((0, 3), (1, 2)):
        for client in range(2):
            for a, b in zip(parts(few, half)[client], parts(many, half)[client], strict=True):
                assert torch.equal(a, b[:count])
    images = torch.cat([x for half in (0, 1) for x, _ in parts(many, half)])
    assert len(images.unique(dim=0)) == 3 * (6 + 4)


@pytest.mark.parametrize(
    ("make", "options"), [(shapes, {"samples": 60}), (tabular, {"clients": 3})]
)
def test_sites_differ_by_the_shift_alone(make: Any, options: dict[str, int]) -> None:
    """Means over a client's inputs, by channel or feature, in deviations of the first client."""

    def distance(shift: float) -> float:
        inputs = [x.float() for x, _ in parts(make(0, shift=shift, **options))]
        if inputs[0].dim() == 4:
            inputs = [x.mean((2, 3)) for x in inputs]
        means = torch.stack([x.mean(0) for x in inputs])
        return float(((means - means[0]).abs() / inputs[0].std(0)).mean())

    assert distance(0.0) < 0.2
    assert distance(0.0) < distance(0.3) < distance(1.0)


def test_every_fourth_scanner_inverts() -> None:
    """Shapes are darker than the background there."""
    contrasts = [
        (images.float().mean(1)[masks > 0].mean() - images.float().mean(1)[masks == 0].mean()) > 0
        for images, masks in parts(shapes(0, samples=10, clients=5, shift=1.0))
    ]
    assert [bool(each) for each in contrasts] == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("name", "rows", "features", "classes"),
    [("breast_cancer", 569, 30, 2), ("wine", 178, 13, 3), ("diabetes", 442, 10, None)],
)
def test_tables_are_divided_whole(name: str, rows: int, features: int, classes: int | None) -> None:
    data = tabular(seed=0, name=name, shift=0.0)
    assert data.classes == classes
    pieces = [*parts(data), *parts(data, 1)]
    x, y = (torch.cat(each) for each in zip(*pieces, strict=True))
    assert (x.shape, x.dtype) == ((rows, features), torch.float32)
    torch.testing.assert_close(x.mean(0), torch.zeros(features), atol=1e-5, rtol=0)
    for (_, train), (_, test) in zip(parts(data), parts(data, 1), strict=True):
        assert len(test) == (len(train) + len(test)) // 5
    if classes is None:
        assert (y.shape, y.dtype) == ((rows,), torch.float32)
        assert y.std(correction=0) == pytest.approx(1, abs=1e-4)
    else:
        assert y.dtype == torch.int64
        assert y.unique().tolist() == list(range(classes))


def config_of(*words: str, target: str = "tabular:tabular") -> Any:
    module = f"data.target=fedtan_hpc.data.examples.{target}"
    [config] = cli.compose(["data=import", module, "partition=natural", *words])
    return config


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("tabular:tabular", "{name: iris}"),
        ("tabular:tabular", "{shift: -1}"),
        ("shapes:shapes", "{clients: 0}"),
        ("shapes:shapes", "{size: 4}"),
    ],
)
def test_wrong_arguments_are_mistakes_of_the_options(target: str, options: str) -> None:
    config = config_of(f"data.options={options}", target=target)
    with pytest.raises(ConfigError, match=r"^data\.target=.*; it raised ValueError: .*(least|not)"):
        load_own(config.data, 0)


def test_a_job_trains_on_a_table(tmp_path: Path) -> None:
    words = ("data.options={name: wine, clients: 3}", "rounds=8", f"run_dir={tmp_path}")
    summary = fedtan_hpc.run(config_of(*words), callbacks=[])
    assert summary.clients_judged == 3
    assert summary.test_accuracy is not None
    assert summary.test_accuracy > 0.8
