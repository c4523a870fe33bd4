"""Jobs handed to SLURM, or to this machine in the background, by submitit.

A submitted run that is asked to stop, by preemption or its time limit, finishes its round, saves
itself and is queued again, as often as it takes: see ``requeue``.  (submitit's own way,
``checkpoint()``, is called on one rank inside a signal handler, where ranks cannot agree on a
round; it serves the minutes before the first round alone.)
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import submitit
from submitit.core.utils import FailedJobError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from ..config.errors import ConfigError, Stopped
from ..config.schema import Config
from ..config.submit_options import ClusterName, LaunchConfig, SubmitConfig
from ..job import run_dir
from ..runtime import atomic_files
from . import requeue

_NEVER = 1_000_000
"""Time-outs after which submitit would give a job up."""
_LOCAL_AGAIN = 144
"""The exit code at which submitit starts a job on this machine again."""


@dataclass(frozen=True)
class Job:
    """What each rank of a submitted job calls."""

    config: Config

    def __call__(self) -> None:
        """Run; asked to stop before the end, end with the exit code that has the job run again."""
        from .. import cli
        from ..distributed import process_group
        from ..job.run import run  # torch is for the ranks, not for those that submit

        where = submitit.JobEnvironment().cluster
        if where == "local":
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        with cli.exit_codes("fedtan_hpc"):
            try:
                run(self.config)
            except Stopped as stopped:
                if where == "local" and stopped.signal == signal.SIGUSR2:  # the time limit
                    print(f"fedtan_hpc: {stopped}", file=sys.stderr, flush=True)
                    os._exit(_LOCAL_AGAIN)
                raise
            except Exception as error:
                if not process_group.has_lost_a_rank(error.__cause__ or error):
                    requeue.has_said()
                raise

    def checkpoint(self) -> DelayedSubmission:
        """For submitit: what to run when a job that had no round yet is queued again."""
        return DelayedSubmission(self)


@dataclass(frozen=True)
class Submitted:
    """A job that was handed over."""

    job_id: str
    run_dir: Path


def submit_all(configs: Sequence[SubmitConfig]) -> list[Submitted]:
    """Hand over every point of a sweep, which must be checked, each with a folder of its own.

    Raises ``ConfigError`` with the cluster's own words if it refuses them.
    """
    launch = configs[0].launch
    jobs = [_with_folder(config.job()) for config in configs]
    try:
        executor = _executor(launch)
        with _quiet_children(launch), executor.batch():
            handed = [executor.submit(job) for job in jobs]
    except (FailedJobError, RuntimeError, ValueError, OSError) as error:
        _refused(launch, error)
    found = []
    for job, each in zip(jobs, handed, strict=True):
        found.append(Submitted(each.job_id, Path(str(job.config.run_dir))))
        _note(found[-1], launch, each.paths)
    if launch.cluster is ClusterName.debug:
        for each in handed:
            each.result()
    return found


@contextmanager
def _quiet_children(launch: LaunchConfig) -> Iterator[None]:
    """A job on this machine has logs; with our output too, a pipe would wait for its end."""
    if launch.cluster is not ClusterName.local:
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        for number in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, own in kept.items():
            os.dup2(own, number)
            os.close(own)
        os.close(nowhere)


def _with_folder(config: Config) -> Job:
    config.run_dir = str(run_dir.name(config))
    return Job(config)


def _executor(launch: LaunchConfig) -> submitit.Executor:
    if launch.cluster is ClusterName.debug:
        return submitit.DebugExecutor(launch.folder)
    if launch.cluster is ClusterName.local:
        local = submitit.LocalExecutor(launch.folder, max_num_timeout=_NEVER)
        local.update_parameters(**local_parameters(launch))
        return local
    slurm = submitit.AutoExecutor(launch.folder, "slurm", slurm_max_num_timeout=_NEVER)
    slurm.update_parameters(**slurm_parameters(launch))
    return slurm


def local_parameters(launch: LaunchConfig) -> dict[str, Any]:
    """What submitit is told of a job on this machine."""
    return {
        "tasks_per_node": launch.tasks_per_node,
        "gpus_per_node": (launch.gpus_per_task or 0) * launch.tasks_per_node,
        "timeout_min": launch.timeout_min,
        "signal_delay_s": launch.signal_delay_s,
    }


def slurm_parameters(launch: LaunchConfig) -> dict[str, Any]:
    """What submitit is told of a SLURM job; what is left out is the cluster's own."""
    more = dict(each.partition("=")[::2] for each in launch.sbatch)
    special: dict[str, Any] = {
        "setup": requeue.before(Path(launch.folder)),
        "teardown": requeue.AFTER,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "gpus_per_task": launch.gpus_per_task,
        "signal_delay_s": launch.signal_delay_s,
        "array_parallelism": launch.array_parallelism,
        "additional_parameters": {
            "requeue": True,
            **{name: value or True for name, value in more.items()},
        },
        # Each rank says itself that it ends, and with which code; one that waits for a rank that is
        # gone before they have met does not.
        "srun_args": ["--kill-on-bad-exit=0", "--wait=60"],
    }
    if launch.cpus_per_task:  # srun does not take it from the job since SLURM 22.05
        special["setup"].append(f"export SRUN_CPUS_PER_TASK={launch.cpus_per_task}")
    general = {
        "name": launch.name,
        "nodes": launch.nodes,
        "tasks_per_node": launch.tasks_per_node,
        "timeout_min": launch.timeout_min,
        "cpus_per_task": launch.cpus_per_task,
        "mem_gb": launch.mem_gb,
    }
    return _given({**general, **{f"slurm_{name}": value for name, value in special.items()}})


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _refused(launch: LaunchConfig, error: Exception) -> NoReturn:
    """In the cluster's words, the last line of which says why."""
    said = getattr(error.__cause__, "stderr", None) or str(error)
    words = said.decode() if isinstance(said, bytes) else said
    lines = [line for line in words.strip().splitlines() if line.strip()] or [repr(error)]
    raise ConfigError(f"launch.cluster={launch.cluster} refuses the job: {lines[-1]}") from error


def _note(submitted: Submitted, launch: LaunchConfig, paths: Any) -> None:
    """Leave in the run's folder who has the job, for ``tools/jobs.py``."""
    note = {
        "job_id": submitted.job_id,
        "cluster": str(launch.cluster),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "output": str(paths.stdout),
        "errors": str(paths.stderr),
    }
    submitted.run_dir.mkdir(parents=True, exist_ok=True)
    atomic_files.replace_text(
        submitted.run_dir / "submitted.json", json.dumps(note, indent=2) + "\n"
    )
