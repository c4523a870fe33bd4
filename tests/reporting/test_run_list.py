"""The list of runs: which folders are runs, and the state of each."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import Config
from fedtan_hpc.job import run_dir
from fedtan_hpc.reporting import run_list
from tests.helpers import commands


def record(number: int, **figures: float) -> dict[str, Any]:
    """A line of rounds.jsonl."""
    names = ["train_loss", "learning_rate", "round_seconds", "comm_messages", "comm_bytes"]
    names += ["payload_messages", "payload_bytes", "clients"]
    return {"round": number, **dict.fromkeys(names, 1), **figures}


SUMMARY = {
    **dict.fromkeys(("rounds", "world_size", "parameters", "peak_memory_bytes"), 2),
    **dict.fromkeys(("test_accuracy", "test_loss"), 0.5),
    **dict.fromkeys(("total_seconds", "startup_seconds", "median_round_seconds"), 1.0),
    **dict.fromkeys(("algorithm", "backend", "device", "run_dir"), ""),
    "versions": {},
}


def run_in(folder: Path, job: str = "7", cluster: str = "slurm", **files: Any) -> Path:
    """A run's folder with a note of its submission and ``files`` by name."""
    folder.mkdir()
    note = {"job_id": job, "cluster": cluster, "errors": str(folder / "log.err")}
    (folder / "submitted.json").write_text(json.dumps(note))
    lines = [record(1, test_accuracy=0.5, test_loss=1.0), record(2)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


FAILED: dict[str, Any] = {"failure": {"message": "rank 1, round 3: OSError: the disk is gone"}}
STOPPED: dict[str, Any] = {"failure": {"message": "stopped by SIGTERM after round 2"}}


@pytest.mark.parametrize(
    ("files", "queue", "state", "why"),
    [
        ({"summary": SUMMARY}, {}, "finished", ""),
        (FAILED, {}, "failed", "rank 1, round 3: OSError: the disk is gone"),
        (STOPPED, {}, "stopped", "stopped by SIGTERM after round 2"),
        (STOPPED, {"7": ("pending", "BeginTime")}, "pending", "stopped by SIGTERM after round 2"),
        ({}, {"7": ("pending", "Priority")}, "pending", "Priority"),
        ({}, {"7": ("running", "None")}, "running", ""),
    ],
)
def test_the_state_of_a_run(
    files: dict[str, Any], queue: dict[str, tuple[str, str]], state: str, why: str, tmp_path: Path
) -> None:
    row = run_list.row_of(run_in(tmp_path / "run", **files), queue)
    assert (row.state, row.why) == (state, why)
    assert (row.job, row.round, row.result) == ("7", "2", "accuracy 50 %")


def test_a_run_that_left_no_word_shows_the_end_of_its_log(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    (run / "log.err").write_text("slurmstepd: error: Detected 1 oom-kill event(s)\n\n")
    row = run_list.row_of(run, {})
    assert row.state == "gone"
    assert "oom-kill" in row.why


def test_submitted_runs_below_a_folder_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_list, "in_queue", lambda program: {})
    run_in(tmp_path / "b", **FAILED)
    run_in(tmp_path / "a", job="8_1", summary=SUMMARY)
    assert run_list.main([str(tmp_path)]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["run", "job", "state", "round"]
    assert first.split()[1:4] == ["8_1", "finished", "2"]
    assert "the disk is gone" in second


def test_what_cannot_be_found_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_list.main([str(tmp_path / "no")]) == 2
    assert run_list.main([str(tmp_path)]) == 1
    assert "runs: no runs in " in capsys.readouterr().err


def unsubmitted(folder: Path, **files: Any) -> Path:
    """The folder of a run that nobody submitted, with ``files`` by name."""
    run = run_in(folder, **files)
    (run / "submitted.json").unlink()
    (run / "config.yaml").write_text("rounds: 2\n")
    (run / ".lock").touch()
    return run


@pytest.mark.parametrize(
    ("files", "state", "why"),
    [
        ({"summary": SUMMARY}, "finished", ""),
        (FAILED, "failed", "rank 1, round 3: OSError: the disk is gone"),
        (STOPPED, "stopped", "stopped by SIGTERM after round 2"),
        ({}, "gone", "no message; the process may have been killed"),
    ],
)
def test_the_state_of_a_run_that_nobody_submitted(
    files: dict[str, Any], state: str, why: str, tmp_path: Path
) -> None:
    run = unsubmitted(tmp_path / "run", **files)
    assert run_list.row_of(run, None) == (str(run), "", state, "2", "accuracy 50 %", why)


def test_a_run_whose_folder_a_process_has_locked_is_running(tmp_path: Path) -> None:
    run = unsubmitted(tmp_path / "run")
    with open(run / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_list.row_of(run, None).state == "running"
    assert run_list.row_of(run, None).state == "gone"


def test_a_submitted_run_that_went_on_by_hand_is_running(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    with open(run / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_list.row_of(run, {}).state == "running"


def test_the_list_does_not_disturb_a_run(tmp_path: Path) -> None:
    """A run keeps its lock while the list looks at it, and no other run gets it."""
    run, config = tmp_path / "run", Config()
    with run_dir.claimed(run, config):
        run_dir.begin(run, config)
        before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
        for _ in range(3):
            assert run_list.row_of(run, None).state == "running"
        assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before
        with pytest.raises(ConfigError, match="no other run"), run_dir.claimed(run, config):
            pass
    with run_dir.claimed(run, config):  # the list has released the lock
        pass


def test_all_runs_are_listed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not settings that lie beside no run, and not what an earlier run has left in a run."""
    monkeypatch.setattr(run_list, "in_queue", lambda program: {})
    unsubmitted(tmp_path / "a", summary=SUMMARY)
    unsubmitted(tmp_path / "a" / "interrupted-1")
    (tmp_path / "c").mkdir()
    unsubmitted(tmp_path / "c" / "interrupted-1")  # a name like any other
    run_in(tmp_path / "b", **FAILED)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("rounds: 2\n")
    monkeypatch.chdir(tmp_path)
    assert run_list.main(["."]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b", "c/interrupted-1"]
    assert [line.split()[1:3] for line in lines[:2]] == [["finished", "2"], ["7", "failed"]]


def test_the_queue_is_asked_for_submitted_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_list, "in_queue", lambda program: pytest.fail("asked"))
    unsubmitted(tmp_path / "a")
    assert run_list.main([str(tmp_path)]) == 0


@pytest.mark.slow
def test_a_run_is_listed_while_it_runs_and_when_it_is_done(tmp_path: Path) -> None:
    """By the job's own command line."""
    words = ["clients=2", "local_steps=1", "rounds=100000", "eval_every=1000", "run_dir=run"]
    environment = {**os.environ, "PYTHONPATH": str(commands.ROOT), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        [sys.executable, "-m", "fedtan_hpc", *words],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    assert "run_dir run" in job.stdout.readline()
    assert run_list.row_of(tmp_path / "run", None)[1:3] == ("", "running")
    job.kill()
    job.communicate()
    assert run_list.row_of(tmp_path / "run", None).state == "gone"


@pytest.mark.parametrize(
    ("program", "name"),
    [((str(commands.ROOT / "tools" / "jobs.py"),), "jobs"), (("-m", "fedtan_hpc.runs"), "runs")],
    ids=["tool", "module"],
)
def test_a_pipe_that_nobody_reads_and_a_mistake_end_the_command(
    program: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    unsubmitted(tmp_path / "run", summary=SUMMARY)
    environment = {**os.environ, "PYTHONPATH": str(commands.ROOT)}
    for folder, code, start in ((str(tmp_path), 141, ""), ("nowhere", 2, f"{name}: nowhere: ")):
        command = subprocess.Popen(
            [sys.executable, *program, folder],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert command.stdout is not None
        command.stdout.close()
        _, errors = command.communicate()
        assert command.returncode == code, errors
        assert errors.startswith(start)
        assert errors.count("\n") == (1 if start else 0)


def test_what_a_file_says_is_shown_on_one_printable_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a\x1b[31m[bold]"
    folder.mkdir()
    (folder / "config.yaml").write_text("rounds: 3\n")
    message = {"message": "first\n\x1b]0;title\x07\u202e" + "x" * 10_000}
    (folder / "failure.json").write_text(json.dumps(message))
    assert run_list.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    assert "a\\x1b[31m[bold]" in lines[1]
    assert "first\\n\\x1b]0;title\\x07\\u202ex" in lines[1]
