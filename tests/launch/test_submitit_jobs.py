"""Submission: what SLURM gets, mistakes in the options, and jobs on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.submit_options import ClusterName, LaunchConfig, SubmitConfig, check_launch
from fedtan_hpc.launch import requeue
from fedtan_hpc.launch.submitit_jobs import slurm_parameters
from tests.helpers import commands

SUBMIT = str(commands.ROOT / "slurm" / "submit.py")
SHORT = ("clients=2", "local_steps=1", "rounds=4")

NEWLINE = "\n"
SCRIPT = f"""\
#!/bin/bash

# Parameters
#SBATCH --account=physics
#SBATCH --array=0-1%2
#SBATCH --cpus-per-task=3
#SBATCH --error=FOLDER/%A_%a_0_log.err
#SBATCH --exclusive
#SBATCH --gpus-per-task=1
#SBATCH --job-name=fedtan_hpc
#SBATCH --mem=8GB
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/%A_%a_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --reservation=mine
#SBATCH --signal=USR2@90
#SBATCH --time=240
#SBATCH --wckey=submitit

# setup
{NEWLINE.join(requeue.setup_lines(Path("FOLDER"))).replace(os.getcwd() + os.sep, "")}
trap : USR1
export SRUN_CPUS_PER_TASK=3

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/%A_%a_%t_log.out --error FOLDER/%A_%a_%t_log.err \
--kill-on-bad-exit=0 --wait=60 PYTHON -u -m submitit.core._submit FOLDER


# teardown
{NEWLINE.join(requeue.teardown_lines())}"""
"""With submitit 1.5."""


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that accepts every script."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", "echo Submitted batch job 77"), ("srun", "exit 1")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def submit(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return commands.run("python", SUBMIT, *words, cwd=cwd)


def test_the_script_that_sbatch_gets(fake_slurm: Path) -> None:
    words = (
        "launch.nodes=2",
        "launch.tasks_per_node=4",
        "launch.gpus_per_task=1",
        "launch.cpus_per_task=3",
        "launch.mem_gb=8",
        "launch.partition=gpu",
        "launch.account=physics",
        "launch.timeout_min=240",
        "launch.sbatch=['reservation=mine',exclusive]",
    )
    done = submit(*words, *SHORT, "-m", "seed=0,1", cwd=fake_slurm)
    assert done.returncode == 0, done.stderr
    folder = fake_slurm / "runs" / "submitted"
    script = folder / "77_submission.sh"
    python = re.escape(sys.executable)
    text = re.sub(python, "PYTHON", script.read_text().replace(str(folder), "FOLDER"))
    assert text == SCRIPT
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["77_0", "77_1"]
    for line in lines:
        note = json.loads((fake_slurm / line.split()[3] / "submitted.json").read_text())
        assert note["job_id"] == line.split()[1]
        assert note["cluster"] == "slurm"


def test_submission_needs_no_torch(fake_slurm: Path) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['submit', 'rounds=3']; "
        f"runpy.run_path({SUBMIT!r}, run_name='__main__'); assert 'torch' not in sys.modules"
    )
    done = commands.run("python", "-c", code, cwd=fake_slurm)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("launch.nodes=0",), "launch.nodes=0: allowed is a whole number >= 1"),
        (("launch.nod=2",), "launch.nod=2: no such option; did you mean launch.nodes?"),
        (("launch.nodes=two",), "launch.nodes=two: allowed is a whole number"),
        (("launch.cluster=pbs",), "launch.cluster=pbs: allowed is slurm | local | debug"),
        (("rounds=0",), "rounds=0: allowed is a whole number >= 1"),
        (("launch.timeout_min=1",), "launch.signal_delay_s=90: allowed is below the time limit"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(
    words: tuple[str, ...], message: str, fake_slurm: Path
) -> None:
    done = submit(*words, cwd=fake_slurm)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"submit: {message}")
    assert not (fake_slurm / "runs").exists()


def test_several_nodes_are_not_on_this_machine() -> None:
    launch = LaunchConfig(cluster=ClusterName.local, nodes=2)
    with pytest.raises(ConfigError, match=r"launch.nodes=2: allowed is 1"):
        check_launch(launch)
    with pytest.raises(ConfigError, match=r"launch.tasks_per_node=2: allowed is 1"):
        check_launch(LaunchConfig(cluster=ClusterName.debug, tasks_per_node=2))
    with pytest.raises(
        ConfigError, match=r"ranks_per_client=4: allowed is a divisor of .*, 6; set"
    ):
        check_launch(LaunchConfig(nodes=2, tasks_per_node=3), ranks_per_client=4)


def test_the_cluster_has_defaults_for_options_that_are_left_out() -> None:
    told = slurm_parameters(LaunchConfig())
    assert not {"slurm_partition", "slurm_account", "mem_gb", "slurm_gpus_per_task"} & set(told)


def test_the_job_has_all_options_but_those_of_its_launch() -> None:
    assert SubmitConfig(rounds=7).job().rounds == 7


@pytest.mark.slow
def test_a_job_in_the_background_of_this_machine(tmp_path: Path) -> None:
    """Two ranks; the command returns before they are done."""
    local = ("launch.cluster=local", "launch.tasks_per_node=2", "run_dir=run")
    done = submit(*local, *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "summary.json").exists():
        logs = [path.read_text() for path in tmp_path.glob("runs/submitted/*log.*")]
        assert time.monotonic() < deadline, "\n".join(logs)
        time.sleep(0.2)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == 2


@pytest.mark.slow
def test_a_job_in_this_process(tmp_path: Path) -> None:
    done = submit("launch=debug", *SHORT, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
