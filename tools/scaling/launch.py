"""The runs of a scaling study: processes of their own, by the launcher that is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedtan_hpc import cli
from fedtan_hpc.config.errors import ConfigError, RunError, format_option_error
from fedtan_hpc.config.submit_options import LaunchConfig, SubmitConfig, check_launch
from fedtan_hpc.job import run_dir

LAUNCHERS = ("torchrun", "mpirun", "slurm")
_LOOKING_SECONDS = 1.0


@dataclass(frozen=True)
class Point:
    """A run of the job."""

    method: str
    ranks: int
    clients: int
    repeat: int
    folder: Path
    words: list[str]
    """Options of the job, its folder apart."""

    @property
    def is_finished(self) -> bool:
        """Whether its result is there."""
        return (self.folder / "summary.json").exists()

    @property
    def options(self) -> list[str]:
        """All words of the job."""
        return [*self.words, f"run_dir={self.folder}"]


def check_launcher(launcher: str, launch: Sequence[str]) -> None:
    """Raise ``ConfigError`` if the launcher is not here, or is told what it does not know."""
    program = {"mpirun": "mpirun", "slurm": "sbatch"}.get(launcher)
    if program and _path_of(program) is None:
        remedy = f"install {launcher}, or take another launcher"
        allowed = f"one whose {program} is there"
        raise ConfigError(format_option_error("launcher", launcher, allowed, remedy))
    if launch and launcher != "slurm":
        raise ConfigError(
            format_option_error("launcher", launcher, "slurm with launch.*", "leave those out")
        )
    if launcher == "slurm":
        check_launch(_launch(launch, 1))


def run_all(points: Sequence[Point], launcher: str, launch: Sequence[str]) -> None:
    """Run the points that are not finished, one after another, so that none disturbs another.

    Raises ``RunError`` that names the point that failed and ends with what it said.
    """
    console = Console()
    missing = [point for point in points if not point.is_finished]
    console.print(f"{len(points) - len(missing)} of {len(points)} runs are finished")
    for number, point in enumerate(missing, 1):
        name = f"run {number}/{len(missing)}  {point.folder.name}"
        begun = time.monotonic()
        with console.status(name):
            _submit(point, launch) if launcher == "slurm" else _start(point, launcher)
        console.print(f"{name}: {time.monotonic() - begun:.0f} s", highlight=False)


def _start(point: Point, launcher: str) -> None:
    done = subprocess.run(
        [*_words(launcher, point.ranks), "-m", "fedtan_hpc", *point.options],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise _failure(point, done.stderr)


def _words(launcher: str, ranks: int) -> list[str]:
    """The launcher's command line; a single rank needs none."""
    if ranks == 1:
        return [sys.executable]
    if launcher == "mpirun":
        return [str(_path_of("mpirun")), "-n", str(ranks), sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*torchrun, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def _path_of(program: str) -> str | None:
    """Beside this Python first, where wheels put theirs."""
    beside = Path(sys.executable).parent / program
    return str(beside) if beside.exists() else shutil.which(program)


def _submit(point: Point, launch: Sequence[str]) -> None:
    """Hand the job to SLURM and wait for its end."""
    from fedtan_hpc.launch import submitit_jobs

    [config] = cli.compose_as(SubmitConfig, "submit", point.options)
    config.launch = _launch(launch, point.ranks)
    [job] = submitit_jobs.submit_all([config])
    while not point.is_finished:
        time.sleep(_LOOKING_SECONDS)
        if why := run_dir.failure(point.folder):
            raise _failure(point, why)
        if not _is_in_queue(job.job_id) and not point.is_finished:
            time.sleep(_LOOKING_SECONDS)  # for file systems that show files late
            if not point.is_finished:
                raise _failure(point, "it left the queue without a result")


def _is_in_queue(job: str) -> bool:
    words = ["squeue", "-h", "-j", job, "-o", "%T"]
    return bool(subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip())


def _launch(words: Sequence[str], ranks: int) -> LaunchConfig:
    """As many nodes as the ranks fill, ``launch.tasks_per_node`` on each."""
    [config] = cli.compose_as(SubmitConfig, "submit", list(words))
    launch = config.launch
    launch.tasks_per_node = min(launch.tasks_per_node, ranks)
    if ranks % launch.tasks_per_node:
        allowed = f"a number that divides the ranks, {ranks}"
        remedy = "set another, or other world_sizes"
        option = "launch.tasks_per_node"
        raise ConfigError(format_option_error(option, launch.tasks_per_node, allowed, remedy))
    launch.nodes = ranks // launch.tasks_per_node
    return launch


def _failure(point: Point, said: str) -> RunError:
    lines = [line for line in said.strip().splitlines() if line.startswith("fedtan_hpc: ")]
    last = lines[0] if lines else (said.strip().splitlines() or ["it said nothing"])[-1]
    return RunError(f"{point.folder}: {last}{os.linesep}", on_all_ranks=True)
