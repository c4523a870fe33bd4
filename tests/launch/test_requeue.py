"""A job is queued again after a signal and after a lost rank, but not after a reported failure."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fedtan_hpc import cli
from fedtan_hpc.config.errors import ConfigError, RunError, Stopped
from fedtan_hpc.distributed.process_group import LostRankError
from fedtan_hpc.launch import requeue
from fedtan_hpc.runtime import failure_file
from tests.helpers import commands

ENDS = [
    (0, {}, "", None),
    (1, {}, "", None),  # a rank that reported why it fails
    (138, {}, "", "requeue 77"),
    (140, {"SLURM_RESTART_COUNT": "20"}, "", "requeue 77"),
    (143, {}, "", "requeue 77"),
    (143, {}, "kill $$; /bin/sleep 0.3; ", None),  # cancelled
    (137, {}, "", "requeue 77"),
    (137, {}, "kill $$; /bin/sleep 0.3; ", None),
    (139, {"SLURM_RESTART_COUNT": "19"}, "", "requeue 77"),
    (139, {"SLURM_RESTART_COUNT": "20"}, "", None),
    (137, {}, 'touch "$FEDTAN_HPC_FAILURE_FILE"; ', None),  # srun has killed those that waited
    (253, {}, "", None),  # out of memory
    (140, {"SLURM_ARRAY_JOB_ID": "75", "SLURM_ARRAY_TASK_ID": "2"}, "", "requeue 75_2"),
]


@pytest.fixture
def fake_slurm(tmp_path: Path) -> Path:
    """Programs srun, scontrol and sleep that do nothing of the kind, and a job's folder."""
    (tmp_path / "bin").mkdir()
    programs = {
        "srun": 'bash -c "$SRUN_DOES"',
        "scontrol": "echo asked $@",
        "sleep": ":",
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "the job").mkdir()
    return tmp_path


@pytest.mark.parametrize("way", ["sbatch", "submitit"])
@pytest.mark.parametrize(("code", "variables", "first", "asked"), ENDS)
def test_a_job_is_queued_again(
    way: str,
    code: int,
    variables: dict[str, str],
    first: str,
    asked: str | None,
    fake_slurm: Path,
) -> None:
    """The batch script decides by srun's exit code, in a job of either kind."""
    folder = fake_slurm / "the job"
    script = fake_slurm / "script"
    if way == "sbatch":
        script.write_text(requeue.script())
    else:
        lines = [*requeue.setup_lines(folder), "trap : USR1", "srun", *requeue.teardown_lines()]
        script.write_text("\n".join(lines))
    done = subprocess.run(
        ["bash", str(script)],
        env={
            "PATH": f"{fake_slurm / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "SRUN_DOES": f"{first.replace('$$', '$(ps -o ppid= $PPID)')}exit {code}",
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NUM_NODES": "1",
            **variables,
        },
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert done.stdout.split() == (["asked", *asked.split()] if asked else [])
    said = (
        f"fedtan_hpc: exit code {code}: asks SLURM to queue job {asked.split()[1]} again\n"
        if asked
        else ""
    )
    assert done.stderr == said
    assert not list(folder.iterdir())


def test_train_sbatch_passes_usr1_on_to_srun(fake_slurm: Path) -> None:
    """SLURM signals the script alone before the time limit."""
    waits = "trap 'exit 138' USR1; kill -USR1 $(ps -o ppid= $PPID); while true; do :; done"
    (fake_slurm / "bin" / "srun").write_text(
        f"#!/bin/bash\nPPID_=$PPID\n{waits}\n".replace("$(ps -o ppid= $PPID)", "$PPID")
    )
    done = subprocess.run(
        ["bash", "-c", requeue.script()],
        env={
            "PATH": f"{fake_slurm / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NUM_NODES": "1",
        },
        cwd=fake_slurm,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (138, "asked requeue 77\n")


def test_the_script_is_the_file_in_slurm() -> None:
    assert requeue.script() == (commands.ROOT / "slurm" / "train.sbatch").read_text()
    assert requeue.script().startswith("#!/bin/bash\n")


@pytest.mark.parametrize("folder", ["logs/%j", "~/jobs", "logs"])
def test_the_failure_file_lies_where_the_script_can_know(folder: str) -> None:
    """Job numbers and home folders are put in later, and not in quotes."""
    first, *rest = requeue.setup_lines(Path(folder))
    assert "%" not in first
    assert "~" not in first
    [line] = [each for each in rest if each.startswith("export")]
    assert "=$failure_folder/" in line
    assert line.endswith("-$SLURM_JOB_ID")


def test_a_failure_file_is_written_only_for_a_batch_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    failure_file.write()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("FEDTAN_HPC_FAILURE_FILE", str(tmp_path / "new" / "7.failed"))
    failure_file.write()
    assert (tmp_path / "new" / "7.failed").exists()


def test_a_failure_file_that_cannot_be_written_hides_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDTAN_HPC_FAILURE_FILE", str(tmp_path / "file" / "7.failed"))
    failure_file.write()


class Left(BaseException):
    """The process has exited."""


@pytest.mark.parametrize(
    ("error", "reported"),
    [
        (ConfigError("rounds=0: allowed is a whole number >= 1"), True),
        (RunError("round 3: the loss is not finite", on_all_ranks=True), True),
        (ValueError("a bug"), True),
        (RuntimeError("Connection closed by peer"), False),  # the other rank is lost
        (LostRankError("round 3: another rank has ended", on_all_ranks=False), False),
        (RunError("callback: Connection closed by peer", on_all_ranks=False), True),
        (Stopped("stopped by SIGTERM after round 2", 15), False),
    ],
    ids=str,
)
def test_a_rank_that_reports_its_failure_writes_the_failure_file(
    error: Exception, reported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another try of the job would fail too, but not after a signal or the loss of another rank."""

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv("FEDTAN_HPC_FAILURE_FILE", str(tmp_path / "7.failed"))
    with pytest.raises(Left), cli.exit_codes("fedtan_hpc"):
        raise error
    assert (tmp_path / "7.failed").exists() == reported
