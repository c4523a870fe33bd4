"""Checkpoints: whole or refused, taken up on any number of ranks, with the results of one run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedtan_hpc
from fedtan_hpc.config.enums import (
    AlgorithmName,
    ModelName,
    PartitionName,
    PrecisionName,
    ServerOptimizerName,
)
from fedtan_hpc.config.errors import ConfigError, RunError, Stopped
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    PartitionConfig,
    ServerConfig,
)
from fedtan_hpc.evaluation.records import RoundCallback, RoundRecord, Summary
from fedtan_hpc.job import checkpoint_format, checkpoint_writer, resume, run_dir
from fedtan_hpc.job import run as run_module
from fedtan_hpc.job.trainer import _common
from fedtan_hpc.runtime import launcher_env
from tests.helpers import commands
from tests.helpers.ranks import on_ranks

ROUNDS = 6
TENSORS: dict[str, Any] = {
    "a": torch.arange(6.0).view(2, 3),
    "b": [torch.zeros(0), torch.tensor(3)],
}


def config_of(name: str, folder: Path | str, **options: Any) -> Config:
    """Unequal clients, three of four in a round, and whatever the method keeps between rounds."""
    server = ServerOptimizerName.none
    if name == "fedavg":
        server = ServerOptimizerName.adam
    defaults: dict[str, Any] = {
        "clients": 4,
        "clients_per_round": None if name == "centralised" else 3,
        "partition": PartitionConfig(name=PartitionName.dirichlet, alpha=0.5),
        "optimizer": OptimizerConfig(lr=0.1, momentum=0.9),
        "server": ServerConfig(optimizer=server),
        "rounds": ROUNDS,
        "local_steps": 2,
        "eval_every": 2,
        "checkpoint": CheckpointConfig(every=2),
        "algorithm": AlgorithmConfig(name=AlgorithmName(name)),
        "run_dir": str(folder),
    }
    return Config(**{**defaults, **options})


class StopAfter(RoundCallback):
    """Asks for the end in a round, as a user's Ctrl-C would."""

    def __init__(self, number: int, kind: int = signal.SIGINT) -> None:
        self.number, self.kind = number, kind

    def round(self, record: RoundRecord) -> None:
        if record.round == self.number - 1:
            os.kill(os.getpid(), self.kind)


def run(config: Config) -> Summary:
    return fedtan_hpc.run(config, RoundCallback())


def run_until(config: Config, number: int) -> None:
    """Stopped after round ``number``, on every rank."""
    with pytest.raises(Stopped, match=f"after round {number}"):
        fedtan_hpc.run(config, StopAfter(number))


def state_of(folder: Path) -> dict[str, Tensor]:
    return dict(torch.load(folder / "model.pt"))


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def same_bits(a: Path, b: Path) -> bool:
    first, second = state_of(a), state_of(b)
    return first.keys() == second.keys() and all(
        bits(first[name]) == bits(second[name]) for name in first
    )


def bits(value: Tensor) -> bytes:
    return value.contiguous().numpy().tobytes()


METHODS = ["fedtan", "fedavg", "fedbn", "silobn", "fixbn", "hbn", "centralised", "singleset"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_as_one_that_was_not(
    method: str, ranks: int, tmp_path: Path
) -> None:
    """To the bit, and rounds.jsonl has every round once, with the same losses."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    on_ranks(ranks, run, config_of(method, whole))
    on_ranks(ranks, run_until, config_of(method, parted), 3)
    [summary, *_] = on_ranks(ranks, run, config_of(method, parted))
    assert summary.resumed_after == [3]
    assert same_bits(whole, parted)
    lines = rounds_of(parted)
    assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
    for line, undisturbed in zip(lines, rounds_of(whole), strict=True):
        for key in ("train_loss", "test_accuracy", "clients_own_mix_accuracy_mean"):
            assert line[key] == undisturbed[key]
    if (whole / "clients.pt").exists():
        kept, expected = torch.load(parted / "clients.pt"), torch.load(whole / "clients.pt")
        assert kept.keys() == expected.keys()
        for client, values in expected.items():
            assert all(torch.equal(kept[client][name], value) for name, value in values.items())


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2)])
def test_a_run_goes_on_with_other_ranks(before: int, after: int, tmp_path: Path) -> None:
    """With the same results, to rounding."""
    exact = {"precision": PrecisionName.float64}
    on_ranks(1, run, config_of("fedbn", tmp_path / "whole", **exact))
    on_ranks(before, run_until, config_of("fedbn", tmp_path / "parted", **exact), 3)
    on_ranks(after, run, config_of("fedbn", tmp_path / "parted", **exact))
    expected, found = state_of(tmp_path / "whole"), state_of(tmp_path / "parted")
    for name, value in expected.items():
        assert float((found[name] - value).double().norm()) < 1e-10, name
    kept = torch.load(tmp_path / "parted" / "clients.pt")
    for client, values in torch.load(tmp_path / "whole" / "clients.pt").items():
        for name, value in values.items():
            assert float((kept[client][name] - value).double().norm()) < 1e-10, name


@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 2), (1, 2)])
def test_many_states_are_in_files_by_rank(before: int, after: int, tmp_path: Path) -> None:
    on_ranks(before, run, config_of("fedbn", tmp_path / "whole"))
    on_ranks(before, run_until_with_shards, config_of("fedbn", tmp_path / "parted"), 3)
    shards = list((tmp_path / "parted" / "checkpoints").glob("round-000003.states-*.pt"))
    assert len(shards) == 4  # clients drawn until then, a file each
    on_ranks(after, run, config_of("fedbn", tmp_path / "parted"))
    kept = torch.load(tmp_path / "parted" / "clients.pt")
    for client, values in torch.load(tmp_path / "whole" / "clients.pt").items():
        for name, value in values.items():
            assert torch.allclose(kept[client][name], value, atol=1e-5), name
    shards[0].write_bytes(b"nothing")
    with pytest.raises(checkpoint_format.CorruptCheckpointError, match=shards[0].name):
        resume._read(checkpoint_format.path_of(tmp_path / "parted", 3))


def run_until_with_shards(config: Config, number: int) -> None:
    config.checkpoint.keep = 9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_module,
            "CheckpointWriter",
            partial(checkpoint_writer.CheckpointWriter, one_file_bytes=1),
        )
        run_until(config, number)


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A run with checkpoints after rounds 2, 4 and 5."""
    folder = tmp_path / "run"
    run_until(config_of("fedtan", folder, checkpoint=CheckpointConfig(every=2, keep=9)), 5)
    return folder


def test_the_last_are_kept(tmp_path: Path) -> None:
    run_until(config_of("fedtan", tmp_path, checkpoint=CheckpointConfig(every=1, keep=3)), 5)
    names = [path.name for path in checkpoint_format.existing(tmp_path)]
    assert names == ["round-000005.pt", "round-000004.pt", "round-000003.pt"]


@pytest.mark.parametrize("harm", ["cut", "bit", "empty", "foreign"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    harm: str, interrupted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoint_format.path_of(interrupted, 5)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    harms = {
        "cut": bytes(content[:-1000]),
        "bit": bytes(content),
        "empty": b"",
        "foreign": b"x" * 99,
    }
    newest.write_bytes(harms[harm])
    summary = run(config_of("fedtan", interrupted))
    assert summary.resumed_after == [4]
    assert f"damaged checkpoint {newest}" in capfd.readouterr().err
    assert newest.with_suffix(".damaged").exists()


def test_a_run_without_a_whole_checkpoint_begins_anew(interrupted: Path) -> None:
    for path in checkpoint_format.existing(interrupted):
        path.write_bytes(b"")
    assert run(config_of("fedtan", interrupted)).resumed_after == []
    assert (interrupted / "interrupted-1" / "rounds.jsonl").exists()


def test_a_checkpoint_of_another_configuration_is_refused(interrupted: Path) -> None:
    other = config_of("fedtan", interrupted, batch_size=16, seed=3)
    with pytest.raises(ConfigError, match=r"resume=auto.*another batch_size, seed"):
        run(other)
    assert checkpoint_format.path_of(interrupted, 5).exists()


def test_never_begins_anew_but_for_a_launchers_restart(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = config_of("fedtan", interrupted, resume="never")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launcher_env.restarts() == 1
    taken = resume.load_checkpoint(interrupted, never)
    assert taken is not None
    assert taken.content["round"] == 5
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert run(never).resumed_after == []
    assert (interrupted / "interrupted-1" / "checkpoints").is_dir()


def test_an_older_checkpoint_may_be_asked_for(interrupted: Path) -> None:
    older = checkpoint_format.path_of(interrupted, 2)
    summary = run(config_of("fedtan", interrupted, resume=str(older)))
    assert summary.resumed_after == [2]
    assert [line["round"] for line in rounds_of(interrupted)] == list(range(1, ROUNDS + 1))


def test_another_runs_checkpoint_may_be_asked_for(interrupted: Path, tmp_path: Path) -> None:
    elsewhere = config_of("fedtan", tmp_path / "new", resume=str(interrupted))
    assert run(elsewhere).resumed_after == [5]
    assert [line["round"] for line in rounds_of(tmp_path / "new")] == list(range(1, ROUNDS + 1))
    assert checkpoint_format.path_of(interrupted, 5).exists()


def test_a_file_that_cannot_be_read_now_is_not_damaged(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that stumbles costs no checkpoint."""

    def stumbles(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(Path, "read_bytes", stumbles)
    with pytest.raises(ConfigError, match=r"round-000005.pt.*Stale file handle"):
        resume.load_checkpoint(interrupted, config_of("fedtan", interrupted))
    assert len(checkpoint_format.existing(interrupted)) == 3


def test_a_checkpoint_of_another_format_is_refused(interrupted: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_format, "FORMAT", 99)
        with pytest.raises(ConfigError, match="allowed is a checkpoint of format 99"):
            resume.load_checkpoint(interrupted, config_of("fedtan", interrupted))
    assert len(checkpoint_format.existing(interrupted)) == 3


def test_an_end_while_older_rounds_are_taken_up_leaves_a_run_that_goes_on(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = checkpoint_format.path_of(interrupted, 2)
    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "begin", _killed)
        with pytest.raises(ZeroDivisionError):
            resume.load_checkpoint(interrupted, config_of("fedtan", interrupted, resume=str(older)))
    assert run(config_of("fedtan", interrupted)).resumed_after == [2]


def _killed(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError


def test_what_was_being_written_is_removed(interrupted: Path) -> None:
    left = interrupted / "checkpoints" / ".round-000006.pt.0123abcd"
    left.touch()
    run(config_of("fedtan", interrupted))
    assert not left.exists()


def test_a_file_system_without_locks_is_told(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    run(config_of("fedtan", interrupted))
    assert "has no locks" in capfd.readouterr().err


def test_the_same_run_elsewhere_is_finished_too(interrupted: Path) -> None:
    elsewhere = config_of("fedtan", interrupted, threads=1)
    elsewhere.comm.timeout_seconds = 77.0
    assert run(elsewhere) == run(config_of("fedtan", interrupted))


def test_the_first_word_on_a_failure_stays(tmp_path: Path) -> None:
    run_dir.note_failure(tmp_path, "rank 1: a bad day")
    run_dir.note_failure(tmp_path, "rank 0: another rank has ended")
    assert run_dir.failure(tmp_path) == "rank 1: a bad day"


def test_a_sweep_stops_between_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the last round of one, which is finished."""
    configs = [config_of("fedtan", tmp_path / str(seed), seed=seed) for seed in range(3)]
    monkeypatch.setattr(run_module, "Display", lambda *_: StopAfter(ROUNDS))
    with pytest.raises(Stopped, match="stopped by SIGINT after 1 of 3 points"):
        run_module.run_all(configs)
    assert (tmp_path / "0" / "summary.json").exists()
    assert not (tmp_path / "1").exists()


class Unread(StopAfter):
    """Its reader is ended by the same Ctrl-C."""

    def round(self, record: RoundRecord) -> None:
        super().round(record)
        if record.round >= self.number:
            raise BrokenPipeError


def test_a_reader_that_left_does_not_keep_the_round_from_being_saved(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="after round 4"):
        fedtan_hpc.run(config_of("fedtan", tmp_path), Unread(4))
    assert checkpoint_format.path_of(tmp_path, 4).exists()


@pytest.mark.parametrize("path", ["no/such.pt", "empty.pt", "folder"])
def test_a_checkpoint_that_cannot_be_had_is_a_mistake(path: str, tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=f"resume={tmp_path / path}: allowed is auto, never"):
        run(config_of("fedtan", tmp_path / "run", resume=str(tmp_path / path)))


def test_lines_that_are_missing_are_a_mistake(interrupted: Path) -> None:
    lines = (interrupted / "rounds.jsonl").read_text().splitlines(keepends=True)
    (interrupted / "rounds.jsonl").write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(ConfigError, match="no round 3"):
        run(config_of("fedtan", interrupted))


def test_a_finished_run_stays_finished(interrupted: Path) -> None:
    summary = run(config_of("fedtan", interrupted))
    assert run(config_of("fedtan", interrupted)) == summary


def test_a_checkpoint_holds_nothing_that_runs(interrupted: Path) -> None:
    content = torch.load(checkpoint_format.path_of(interrupted, 5), weights_only=True)
    assert content["config"]["seed"] == 0
    assert set(content["model"]) == set(state_of_run(interrupted))


def state_of_run(folder: Path) -> dict[str, Tensor]:
    run(config_of("fedtan", folder))
    return state_of(folder)


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


def test_a_run_that_goes_on_is_no_failure_any_more(interrupted: Path) -> None:
    assert "stopped by SIGINT" in json.loads((interrupted / "failure.json").read_text())["message"]
    run(config_of("fedtan", interrupted))
    assert not (interrupted / "failure.json").exists()


def test_a_run_that_nobody_saves_can_still_be_stopped(tmp_path: Path) -> None:
    config = config_of("fedtan", tmp_path, checkpoint=CheckpointConfig(every=None))
    run_until(config, 4)
    assert run(config_of("fedtan", tmp_path)).resumed_after == [4]


def test_signals_that_differ_are_one_end() -> None:
    assert _common(0, 0) == 0
    assert _common(3.0 * signal.SIGUSR1, 3) == signal.SIGUSR1
    assert _common(float(signal.SIGTERM + signal.SIGINT), 2) == signal.SIGTERM


def test_the_model_may_hold_any_buffers(tmp_path: Path) -> None:
    """resnet20 with its statistics, in the order of another process."""
    config = config_of(
        "fedtan", tmp_path / "a", model=ModelConfig(name=ModelName.resnet20), rounds=3
    )
    run_until(config, 2)
    run(config)
    whole = config_of("fedtan", tmp_path / "b", model=config.model, rounds=3)
    run(whole)
    assert same_bits(tmp_path / "a", tmp_path / "b")


def test_options_that_say_how_and_not_what_may_change(interrupted: Path) -> None:
    config = config_of("fedtan", interrupted, threads=1)
    config.comm.timeout_seconds = 77.0
    config.checkpoint.keep = 1
    assert run(config).resumed_after == [5]
