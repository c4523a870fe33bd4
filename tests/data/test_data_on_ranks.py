"""Data of the user's own on several ranks."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtan_hpc.config.schema import Config
from tests.data.test_loading import SETTINGS, run
from tests.data.test_own_data import composed, imported, loaded
from tests.helpers.jobs import rounds_of, same_bits, state_of
from tests.helpers.own_data import HERE
from tests.helpers.ranks import on_ranks


def test_targets_are_read_by_all_ranks_together() -> None:
    here = loaded("pair").labels_N
    for labels in on_ranks(2, labels_on_rank):
        assert np.array_equal(here, labels)


def labels_on_rank() -> Any:
    return loaded("pair").labels_N


def run_with_workers(config: Config, folder: str) -> None:
    """A rank of these tests is a daemon, which may not start processes; a rank of a job is none."""
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    is_daemon, settings["daemon"] = settings.get("daemon"), False
    try:
        run(config, folder)
    finally:
        settings["daemon"] = is_daemon


def test_each_rank_has_workers_of_its_own(tmp_path: Path) -> None:
    words = [*SETTINGS["plain"], "data.loading=stream", "algorithm=fedbn"]
    for workers in (0, 2):
        config = composed(*words, f"data.workers={workers}")
        on_ranks(2, run_with_workers, config, str(tmp_path / str(workers)))
    assert same_bits(tmp_path / "0", tmp_path / "2")


@pytest.mark.parametrize("way", ["device", "stream"])
def test_more_ranks_than_test_samples(way: str, tmp_path: Path) -> None:
    words = ["data.test_samples=2", "partition=iid", f"data.loading={way}", "eval_train_samples=1"]
    config = imported("pair", *words, *(["data.workers=0"] if way == "stream" else []))
    on_ranks(3, run, config, str(tmp_path))
    assert rounds_of(tmp_path)[-1]["test_accuracy"] in (0, 0.5, 1)


@pytest.mark.parametrize("way", ["device", "stream"])
def test_clients_models_judge_inputs_of_several_tensors(way: str, tmp_path: Path) -> None:
    words = [f"model.target={HERE}:two_inputs", "model=import", "algorithm=fedbn"]
    words += ["partition=natural", "data.options.kind=dict", f"data.loading={way}"]
    config = imported("sites", *words, *(["data.workers=0"] if way == "stream" else []))
    on_ranks(2, run, config, str(tmp_path))
    assert rounds_of(tmp_path)[-1]["clients_judged"] == 3


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
