"""The files of checkpoints: whole or refused, written safely, the newest kept."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor

from fedtan_hpc.config.errors import ConfigError, RunError
from fedtan_hpc.config.schema import CheckpointConfig, Config
from fedtan_hpc.distributed import process_group
from fedtan_hpc.evaluation.callbacks import RunInfo
from fedtan_hpc.job import checkpoint_format, checkpoint_writer, resume
from fedtan_hpc.job import run as run_module
from tests.helpers import commands
from tests.helpers.jobs import config_of, rounds_of, run, run_until, state_of
from tests.helpers.ranks import on_ranks

ONE = torch.ones(2)
TENSORS: dict[str, Any] = {
    "a": torch.arange(6.0).view(2, 3),
    "b": [torch.zeros(0), torch.tensor(3)],
}


@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 2), (1, 2)])
def test_many_states_are_in_files_by_rank(before: int, after: int, tmp_path: Path) -> None:
    on_ranks(before, run, config_of("fedbn", tmp_path / "whole"))
    on_ranks(before, run_until_with_shards, config_of("fedbn", tmp_path / "parted"), 3)
    shards = list((tmp_path / "parted" / "checkpoints").glob("round-000003.states-*.pt"))
    assert len(shards) == 4  # clients drawn until then, a file each
    every = CheckpointConfig(every=2, keep=9)
    on_ranks(after, run, config_of("fedbn", tmp_path / "parted", checkpoint=every))
    kept = torch.load(tmp_path / "parted" / "clients.pt")
    for client, values in torch.load(tmp_path / "whole" / "clients.pt").items():
        for name, value in values.items():
            assert torch.allclose(kept[client][name], value, atol=1e-5), name
    shards[0].write_bytes(b"nothing")
    with pytest.raises(checkpoint_format.CorruptCheckpointError, match=shards[0].name):
        resume._read(checkpoint_format.path_of(tmp_path / "parted", 3))


@pytest.mark.parametrize(("method", "files"), [("fedbn", 2), ("fedtan", 0)])
def test_each_rank_writes_one_file_of_the_states_that_it_has(
    method: str, files: int, tmp_path: Path
) -> None:
    on_ranks(2, run_until, config_of(method, tmp_path), 3)
    shards = sorted(path.name for path in (tmp_path / "checkpoints").glob("round-000003.states-*"))
    assert shards == [f"round-000003.states-{rank}-0.pt" for rank in range(files)]
    content = checkpoint_format.read(checkpoint_format.path_of(tmp_path, 3))
    assert [name for digests in content["shards"] for name in digests] == shards
    clients = [
        shard["clients"]
        for digests in content["shards"]
        for shard in checkpoint_format.read_shards(tmp_path / "checkpoints" / "x", digests)
    ]
    owners = content["owners"]
    assert clients == [[c for c in sorted(owners) if owners[c] == r] for r in range(files)]


@pytest.mark.parametrize("harm", ["missing", "damaged", "of another round"])
def test_a_checkpoint_with_a_bad_shard_is_damaged(
    harm: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_until(config_of("fedbn", tmp_path), 5)
    shard = checkpoint_format.shard_of(checkpoint_format.path_of(tmp_path, 5), 0, 0)
    older = checkpoint_format.shard_of(checkpoint_format.path_of(tmp_path, 4), 0, 0)
    if harm == "missing":
        shard.unlink()
    else:
        shard.write_bytes(b"nothing" if harm == "damaged" else older.read_bytes())
    assert run(config_of("fedbn", tmp_path)).resumed_after == [4]
    assert f"damaged checkpoint {shard}: " in capfd.readouterr().err


def test_shards_of_removed_checkpoints_are_removed(tmp_path: Path) -> None:
    run_until(config_of("fedbn", tmp_path, checkpoint=CheckpointConfig(every=1, keep=2)), 5)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [
        f"round-00000{number}.{kind}" for number in (4, 5) for kind in ("pt", "states-0-0.pt")
    ]


def run_until_with_shards(config: Config, number: int) -> None:
    config.checkpoint.keep = 9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_module,
            "CheckpointWriter",
            partial(checkpoint_writer.CheckpointWriter, shard_bytes=1),
        )
        run_until(config, number)


def save_elsewhere(folder: Path) -> str:
    """Saves the state of a client on each rank, in a folder that only this rank sees."""
    rank = process_group.rank()
    states = SimpleNamespace(exist=True, owners={0: 0, 1: 1}, state_dict=lambda: {rank: ONE})
    cohort: Any = SimpleNamespace(states=states, state_dict=dict)
    writer = checkpoint_writer.CheckpointWriter(cohort)
    writer.run_began(RunInfo(Config(), folder / str(rank), 0))
    try:
        writer.save(3)
    except RunError as error:
        return str(error)
    return ""


def test_states_that_rank_0_does_not_see_end_the_run(tmp_path: Path) -> None:
    """They would make a checkpoint from which the run could not continue."""
    first, second = on_ranks(2, save_elsewhere, tmp_path)
    shard = tmp_path / "0" / "checkpoints" / "round-000003.states-1-0.pt"
    assert first.startswith(f"rank 1's {shard} is not visible to rank 0: run_dir must be on a file")
    assert second == ""
    assert not checkpoint_format.path_of(tmp_path / "0", 3).exists()


def test_one_file_of_states_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until_with_shards(config_of("fedbn", tmp_path), 3)
    read, alive = checkpoint_format.read, WeakSet[Tensor]()

    def noted(path: Path) -> dict[str, Any]:
        assert not alive
        content = read(path)
        alive.update([content["states"]] if "states" in content else [])
        return content

    monkeypatch.setattr(checkpoint_format, "read", noted)
    assert len(resume._read(checkpoint_format.path_of(tmp_path, 3))["shards"][0]) > 1


def test_the_last_are_kept(tmp_path: Path) -> None:
    run_until(config_of("fedtan", tmp_path, checkpoint=CheckpointConfig(every=1, keep=3)), 5)
    names = [path.name for path in checkpoint_format.existing(tmp_path)]
    assert names == ["round-000005.pt", "round-000004.pt", "round-000003.pt"]


def test_a_file_that_cannot_be_read_now_is_not_damaged(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that stumbles costs no checkpoint."""

    opens = os.open

    def stumbles(path: Path, *flags: int) -> int:
        if Path(path).suffix == ".pt":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return opens(path, *flags)

    monkeypatch.setattr(os, "open", stumbles)
    with pytest.raises(ConfigError, match=r"round-000005.pt.*Stale file handle"):
        resume.load_checkpoint(interrupted, config_of("fedtan", interrupted))
    assert len(checkpoint_format.existing(interrupted)) == 3


def test_a_checkpoint_of_another_format_is_refused(interrupted: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_format, "FORMAT", 99)
        with pytest.raises(ConfigError, match="allowed is a checkpoint of format 99"):
            resume.load_checkpoint(interrupted, config_of("fedtan", interrupted))
    assert len(checkpoint_format.existing(interrupted)) == 3


def test_what_was_being_written_is_removed(interrupted: Path) -> None:
    left = interrupted / "checkpoints" / ".round-000006.pt.0123abcd"
    left.touch()
    run(config_of("fedtan", interrupted))
    assert not left.exists()


def test_a_checkpoint_holds_nothing_that_runs(interrupted: Path) -> None:
    content = torch.load(checkpoint_format.path_of(interrupted, 5), weights_only=True)
    assert content["config"]["seed"] == 0
    assert set(content["model"]) == set(state_of_run(interrupted))


def state_of_run(folder: Path) -> dict[str, Tensor]:
    run(config_of("fedtan", folder))
    return state_of(folder)


def test_the_format_before_shards_were_the_rule_is_refused(interrupted: Path) -> None:
    path = checkpoint_format.path_of(interrupted, 5)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "format": 1}, path)
    with pytest.raises(ConfigError, match=r"format 2; this file has format 1: continue"):
        run(config_of("fedtan", interrupted))


def test_values_are_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "round-000001.pt"
    checkpoint_format.write(path, TENSORS)
    assert repr(checkpoint_format.read(path)) == repr(TENSORS)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for a checkpoint after round 4."""
    write = checkpoint_format.write

    def fails(path: Path, content: dict[str, Any]) -> str:
        if content["round"] >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(checkpoint_format, "write", fails)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_told_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"round-000004.pt: No space left.*round-000002.pt"):
        run(config_of("fedtan", tmp_path))
    checkpoint_format.read(checkpoint_format.path_of(tmp_path, 2))
    note = json.loads((tmp_path / "failure.json").read_text())
    assert "No space left" in note["message"]


@pytest.mark.slow
def test_a_file_that_the_system_refuses_is_told(tmp_path: Path) -> None:
    """No file may have more than 60 kB, and a checkpoint has more."""
    words = ["python", "-m", "fedtan_hpc", "run_dir=run", "local_steps=1", "checkpoint.every=3"]
    line = f"ulimit -f 60; exec {' '.join([sys.executable, *words[1:]])}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(commands.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("fedtan_hpc: rank 0: cannot write run/checkpoints/round-000003.pt: File")
    assert "Traceback" not in done.stderr
    assert len(rounds_of(tmp_path / "run")) >= 3
