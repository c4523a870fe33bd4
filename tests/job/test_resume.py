"""An interrupted run continues on any number of ranks, with the results of one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtan_hpc.config.enums import ModelName, PrecisionName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import ModelConfig
from fedtan_hpc.job import checkpoint_format, resume, run_dir
from fedtan_hpc.runtime import launcher_env
from tests.helpers.jobs import ROUNDS, config_of, rounds_of, run, run_until, same_bits, state_of
from tests.helpers.ranks import on_ranks

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
    assert launcher_env.restart_count() == 1
    assert resume.load_checkpoint(interrupted, never).content["round"] == 5
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert run(never).resumed_after == []
    assert (interrupted / "interrupted-1" / "checkpoints").is_dir()


def test_a_named_checkpoint_serves_a_restart_without_a_whole_one(
    interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = config_of("fedtan", tmp_path / "new", resume=str(interrupted))
    damaged = checkpoint_format.path_of(tmp_path / "new", 6)
    damaged.parent.mkdir(parents=True)
    damaged.touch()
    assert resume.load_checkpoint(tmp_path / "new", config).content["round"] == 5


def test_the_states_of_some_clients_are_no_checkpoint(tmp_path: Path) -> None:
    run_until(config_of("fedbn", tmp_path / "old"), 3)
    shard = checkpoint_format.shard_of(checkpoint_format.path_of(tmp_path / "old", 3), 0, 0)
    with pytest.raises(ConfigError) as caught:
        run(config_of("fedbn", tmp_path / "new", resume=str(shard)))
    [line] = caught.value.mistakes
    assert line.startswith(f"resume={shard}: allowed is auto, never, or a whole checkpoint: ")
    assert "the states of some clients only; name round-000003.pt" in line


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


def test_the_same_run_elsewhere_is_finished_too(interrupted: Path) -> None:
    elsewhere = config_of("fedtan", interrupted, threads=1)
    elsewhere.comm.timeout_seconds = 77.0
    assert run(elsewhere) == run(config_of("fedtan", interrupted))


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


def test_a_run_that_goes_on_is_no_failure_any_more(interrupted: Path) -> None:
    assert "stopped by SIGINT" in json.loads((interrupted / "failure.json").read_text())["message"]
    run(config_of("fedtan", interrupted))
    assert not (interrupted / "failure.json").exists()


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
