"""Jobs that submitit hands to SLURM, or runs on this machine in the background.

A submitted run that is asked to stop, by preemption or before its time limit, finishes its round,
saves it and is queued again by the script of its job (``requeue``).  submitit calls ``checkpoint``
on one rank in a signal handler, where the ranks cannot agree on a round; it serves only the time
before the first round.  Used by ``submit`` and by the scaling study.
"""

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
from ..config.path_options import expanded
from ..config.schema import Config
from ..config.submit_options import ClusterName, LaunchConfig, SubmitConfig
from ..files import atomic_files
from ..job import run_dir
from . import requeue

_NEVER = 1_000_000
"""Number of time-outs after which submitit gives a job up."""
_RESTART_CODE = 144
"""Exit code at which submitit starts a job on this machine again."""

_GENERAL_OPTIONS = ("name", "nodes", "tasks_per_node", "timeout_min", "cpus_per_task", "mem_gb")
_SLURM_OPTIONS = (
    *("partition", "account", "qos", "constraint"),
    *("gpus_per_task", "signal_delay_s", "array_parallelism"),
)
"""Options of ``launch`` that submitit knows by the same names, or with ``slurm_`` before them."""


@dataclass(frozen=True)
class Job:
    """The call that each rank of a submitted job makes."""

    config: Config

    def __call__(self) -> None:
        """Runs the job; the exit code after a signal tells the job's script to queue it again."""
        from .. import cli
        from ..job.run import keep_freed_memory, run  # loads torch, which submitting does not need

        cluster = submitit.JobEnvironment().cluster
        if cluster == "local":
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # submitit's is that of the network
        with cli.exit_codes("fedtan_hpc"):
            try:
                keep_freed_memory(self.config)
                run(self.config)
            except Stopped as stopped:
                if cluster == "local" and stopped.signal == signal.SIGUSR2:  # the time limit
                    print(f"fedtan_hpc: {stopped}", file=sys.stderr, flush=True)
                    os._exit(_RESTART_CODE)
                raise

    def checkpoint(self) -> DelayedSubmission:
        """Returns what submitit runs when a job without any finished round is queued again."""
        return DelayedSubmission(self)


@dataclass(frozen=True)
class Submitted:
    """A submitted job."""

    job_id: str
    run_dir: Path


def submit_all(configs: Sequence[SubmitConfig]) -> list[Submitted]:
    """Submits every point of a sweep as a job with a run folder; the options must be checked.

    Raises ``ConfigError`` with the message of the cluster if it refuses the jobs.
    """
    launch = configs[0].launch
    jobs = [Job(config.job()) for config in configs]
    for job in jobs:
        job.config.run_dir = str(run_dir.name(job.config))
    try:
        executor = _executor(launch)
        with _quiet_children(launch), executor.batch():
            handles = [executor.submit(job) for job in jobs]
    except (FailedJobError, RuntimeError, ValueError, OSError) as error:
        _raise_refusal(launch, error)
    submitted = []
    for job, handle in zip(jobs, handles, strict=True):
        submitted.append(Submitted(handle.job_id, Path(str(job.config.run_dir))))
        run_dir.make(submitted[-1].run_dir, job.config)
        _write_note(submitted[-1], launch, handle.paths)
    if launch.cluster is ClusterName.debug:
        for handle in handles:
            handle.result()
    return submitted


@contextmanager
def _quiet_children(launch: LaunchConfig) -> Iterator[None]:
    """Keeps the standard streams from background jobs: they have logs, and a pipe would wait."""
    if launch.cluster is not ClusterName.local:
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    copies = {stream: os.dup(stream) for stream in (1, 2)}
    try:
        for stream in copies:
            os.dup2(null, stream)
        yield
    finally:
        for stream, copy in copies.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(null)


def _executor(launch: LaunchConfig) -> submitit.Executor:
    logs = expanded(launch.folder)
    if launch.cluster is ClusterName.debug:
        return submitit.DebugExecutor(logs)
    if launch.cluster is ClusterName.local:
        local = submitit.LocalExecutor(logs, max_num_timeout=_NEVER)
        local.update_parameters(
            tasks_per_node=launch.tasks_per_node,
            gpus_per_node=(launch.gpus_per_task or 0) * launch.tasks_per_node,
            timeout_min=launch.timeout_min,
            signal_delay_s=launch.signal_delay_s,
        )
        return local
    slurm = submitit.AutoExecutor(logs, "slurm", slurm_max_num_timeout=_NEVER)
    slurm.update_parameters(**slurm_parameters(launch))
    return slurm


def slurm_parameters(launch: LaunchConfig) -> dict[str, Any]:
    """Returns submitit's parameters of a SLURM job; the cluster has defaults for those left out."""
    options = (option.partition("=") for option in launch.sbatch)
    additional = {name: value or True for name, _, value in options}
    # With --signal=USR2 SLURM signals the ranks; if a user signals the script too, it stays.
    setup = [*requeue.setup_lines(expanded(launch.folder)), "trap : USR1"]
    if launch.cpus_per_task:  # since SLURM 22.05 srun does not take this from the job
        setup.append(f"export SRUN_CPUS_PER_TASK={launch.cpus_per_task}")
    parameters: dict[str, Any] = {
        "slurm_setup": setup,
        "slurm_teardown": requeue.teardown_lines(),
        "slurm_additional_parameters": {"requeue": True, **additional},
        # Each rank ends by itself, with an exit code of its own.  --wait ends the ranks that wait
        # in start-up for a rank that is gone.
        "slurm_srun_args": ["--kill-on-bad-exit=0", "--wait=60"],
        **{name: getattr(launch, name) for name in _GENERAL_OPTIONS},
        **{f"slurm_{name}": getattr(launch, name) for name in _SLURM_OPTIONS},
    }
    return {name: value for name, value in parameters.items() if value is not None}


def _raise_refusal(launch: LaunchConfig, error: Exception) -> NoReturn:
    """Raises ``ConfigError`` with the last line of the cluster's message, which says why."""
    output = getattr(error.__cause__, "stderr", None) or str(error)
    text = output.decode() if isinstance(output, bytes) else output
    lines = [line for line in text.strip().splitlines() if line.strip()] or [repr(error)]
    raise ConfigError(f"launch.cluster={launch.cluster} refuses the job: {lines[-1]}") from error


def _write_note(submitted: Submitted, launch: LaunchConfig, paths: Any) -> None:
    """Writes into the run folder which job has the run and where its logs are, for ``run_list``."""
    note = {
        "job_id": submitted.job_id,
        "cluster": str(launch.cluster),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "output": str(paths.stdout),
        "errors": str(paths.stderr),
    }
    path = submitted.run_dir / "submitted.json"
    atomic_files.replace_text(path, json.dumps(note, indent=2) + "\n")
