"""The picture and the table of a partition show the samples that clients train on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fedtan_hpc.config.enums import PartitionName
from fedtan_hpc.config.schema import Config, DataConfig, PartitionConfig
from fedtan_hpc.data import datasets, download, partition
from fedtan_hpc.reporting import show_partition


def test_the_picture_and_the_table_are_of_the_job_s_partition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []
    draw = show_partition.draw

    def noted(counts: show_partition.Counts, path: Path) -> None:
        drawn.append(counts)
        draw(counts, path)

    monkeypatch.setattr(show_partition, "draw", noted)
    out = tmp_path / "new" / "p.png"
    show_partition.main([f"out={out}", "partition=dirichlet", "clients=30", "seed=3"])
    assert out.read_bytes().startswith(b"\x89PNG")
    dataset = datasets.load(DataConfig(), 3)
    labels = dataset.labels_N[dataset.train]
    parts = partition.split(labels, 30, PartitionConfig(name=PartitionName.dirichlet), 3)
    [counts] = drawn
    assert counts.sum() == len(labels)
    for client, part in enumerate(parts):
        assert [int((labels[part] == k).sum()) for k in range(10)] == counts[client].tolist()
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "digits: 30 clients, dirichlet, seed 3"
    sizes = [len(part) for part in parts]
    assert [int(line.split()[1]) for line in lines[1:21]] == sizes[:20]
    assert lines[21].strip() == "...  and 10 more clients"
    assert f"1437       10  a client has {min(sizes)} to {max(sizes)}" in lines[22]


def test_title_names_the_options() -> None:
    config = Config(partition=PartitionConfig(classes_per_client=3), clients=7, seed=2)
    assert show_partition.title(config) == "digits: 7 clients, shards, classes_per_client=3, seed 2"


@pytest.mark.parametrize("shape", [(1, 2), (100, 100), (3, 100), (100, 2)], ids=str)
def test_few_and_many_clients_and_classes_fit(shape: tuple[int, int], tmp_path: Path) -> None:
    counts = np.arange(shape[0] * shape[1]).reshape(shape) % 7 + 1
    show_partition.draw(counts, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5_000
    assert list(tmp_path.iterdir()) == [tmp_path / "p.png"]


def test_files_that_are_missing_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the job."""
    asked: list[DataConfig] = []
    monkeypatch.setattr(download, "fetch", asked.append)
    show_partition.main([f"out={tmp_path / 'p.png'}", "clients=3"])
    assert asked == [DataConfig()]


@pytest.mark.parametrize("words", [["clients=0"], ["out="], ["partition=none"]], ids=str)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left) as left:
        show_partition.main(words)
    assert left.value.args == (2,)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"show_partition: {words[0]}: ")
