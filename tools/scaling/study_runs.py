"""The runs of a scaling study: processes started by torchrun, mpirun or SLURM."""

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
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Point:
    """A run of the job."""

    method: str
    ranks: int
    clients: int
    repeat: int
    folder: Path
    words: list[str]
    """Options of the job, without its folder."""

    @property
    def is_finished(self) -> bool:
        """Whether the run has written its result."""
        return (self.folder / "summary.json").exists()

    @property
    def options(self) -> list[str]:
        """All options of the job."""
        return [*self.words, f"run_dir={self.folder}"]


def check_launcher(launcher: str, launch_words: Sequence[str]) -> None:
    """Raises ``ConfigError`` if the launcher is not installed, or if its options are wrong."""
    program = {"mpirun": "mpirun", "slurm": "sbatch"}.get(launcher)
    if program and _path_of(program) is None:
        allowed = f"a launcher whose program {program} is installed"
        remedy = f"install {launcher}, or choose another"
        raise ConfigError(format_option_error("launcher", launcher, allowed, remedy))
    if launcher == "slurm":
        check_launch(_launch_config(launch_words, 1))
    elif launch_words:
        allowed, remedy = "slurm with launch.*", "leave those out"
        raise ConfigError(format_option_error("launcher", launcher, allowed, remedy))


def run_all(points: Sequence[Point], launcher: str, launch_words: Sequence[str]) -> None:
    """Runs the unfinished points, one after another, so that none disturbs another.

    Raises ``RunError`` with the folder of the point that failed and its last message.
    """
    console = Console()
    missing = [point for point in points if not point.is_finished]
    console.print(f"{len(points) - len(missing)} of {len(points)} runs are finished")
    for number, point in enumerate(missing, 1):
        name = f"run {number}/{len(missing)}  {point.folder.name}"
        start = time.monotonic()
        with console.status(name):
            _submit(point, launch_words) if launcher == "slurm" else _start(point, launcher)
        console.print(f"{name}: {time.monotonic() - start:.0f} s", highlight=False)


def _start(point: Point, launcher: str) -> None:
    command = [*_launcher_command(launcher, point.ranks), "-m", "fedtan_hpc", *point.options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _failure(point, done.stderr)


def _launcher_command(launcher: str, ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable]
    if launcher == "mpirun":
        return [str(_path_of("mpirun")), "-n", str(ranks), sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*torchrun, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def _path_of(program: str) -> str | None:
    """Returns the program beside this Python, where wheels install it, or else on PATH."""
    beside = Path(sys.executable).parent / program
    return str(beside) if beside.exists() else shutil.which(program)


def _submit(point: Point, launch_words: Sequence[str]) -> None:
    from fedtan_hpc.launch import submitit_jobs

    [config] = cli.compose_as(SubmitConfig, "submit", point.options)
    config.launch = _launch_config(launch_words, point.ranks)
    [job] = submitit_jobs.submit_all([config])
    while not point.is_finished:
        time.sleep(_POLL_SECONDS)
        if reason := run_dir.failure(point.folder):
            raise _failure(point, reason)
        if not _is_in_queue(job.job_id) and not point.is_finished:
            time.sleep(_POLL_SECONDS)  # some file systems show files late
            if not point.is_finished:
                raise _failure(point, "the job left the queue of SLURM without a result")


def _is_in_queue(job_id: str) -> bool:
    command = ["squeue", "-h", "-j", job_id, "-o", "%T"]
    return bool(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())


def _launch_config(words: Sequence[str], ranks: int) -> LaunchConfig:
    """Returns the options of the submission, with ``launch.tasks_per_node`` ranks on each node."""
    [config] = cli.compose_as(SubmitConfig, "submit", list(words))
    launch = config.launch
    launch.tasks_per_node = min(launch.tasks_per_node, ranks)
    if ranks % launch.tasks_per_node:
        option, value = "launch.tasks_per_node", launch.tasks_per_node
        allowed, remedy = f"a number that divides the ranks, {ranks}", "set another, or world_sizes"
        raise ConfigError(format_option_error(option, value, allowed, remedy))
    launch.nodes = ranks // launch.tasks_per_node
    return launch


def _failure(point: Point, output: str) -> RunError:
    """Returns an error with the job's first message in ``output``, or else its last line."""
    lines = output.strip().splitlines() or ["the job printed no message"]
    messages = [line for line in lines if line.startswith("fedtan_hpc: ")]
    return RunError(
        f"{point.folder}: {messages[0] if messages else lines[-1]}\n", on_all_ranks=True
    )
