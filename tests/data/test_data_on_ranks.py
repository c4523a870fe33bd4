"""Data of the user's own on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.data.test_loading import SETTINGS, run
from tests.data.test_own_data import composed, loaded
from tests.helpers.jobs import state_of
from tests.helpers.ranks import on_ranks


def test_targets_are_read_by_all_ranks_together() -> None:
    here = loaded("pair").labels_N
    for labels in on_ranks(2, labels_on_rank):
        assert np.array_equal(here, labels)


def labels_on_rank() -> Any:
    return loaded("pair").labels_N


@pytest.mark.parametrize("name", ["drawn", "few"])
def test_models_are_equal_on_two_ranks(name: str, tmp_path: Path) -> None:
    ways = {"one": 1, "two": 2}
    for way, ranks in ways.items():
        config = composed(*SETTINGS[name], "data.loading=stream", "data.workers=0")
        on_ranks(ranks, run, config, str(tmp_path / way))
    assert_close(state_of(tmp_path / "one"), state_of(tmp_path / "two"))


def test_clients_that_train_alone_are_equal_to_the_bit(tmp_path: Path) -> None:
    """No sum over ranks rounds here, so that each batch must be the same on any rank."""
    for way, ranks in {"device": 1, "stream": 2}.items():
        words = ["algorithm=singleset", "cohort.mode=sequential", f"data.loading={way}"]
        config = composed(*SETTINGS["drawn"], *words, *(["data.workers=0"] if ranks == 2 else []))
        on_ranks(ranks, run, config, str(tmp_path / way))
    first, second = (torch.load(tmp_path / way / "clients.pt") for way in ("device", "stream"))
    assert sorted(first) == [0, 1, 2]
    for client, state in first.items():
        for name, value in state.items():
            assert torch.equal(value, second[client][name]), (client, name)


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=1e-10, atol=1e-10), name
