"""Which rank this process is, from what its launcher left in the environment.  No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..config.errors import ConfigError, format_option_error


@dataclass(frozen=True)
class Launcher:
    """The variables in which a launcher tells each process its place."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


_LAUNCHERS = (
    Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher(
        "srun",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
    ),
)
"""In the order of asking: torchrun may run inside a job of any other, and mpirun inside SLURM's."""
MPI_LAUNCHERS = {launcher.name: launcher.world_size for launcher in _LAUNCHERS[1:3]}
"""Those of MPIs, and how many processes they say that they started."""

CUDA_AWARE = ("OMPI_MCA_opal_cuda_support", "MPIR_CVAR_ENABLE_GPU", "MPICH_GPU_SUPPORT_ENABLED")
"""Variables by which users say that their MPI takes memory of a GPU."""


@dataclass(frozen=True)
class RankInfo:
    """The place of this process: ``rank`` of ``world_size``, ``local_rank`` on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    nodes: int = 1


def detect(variables: Mapping[str, str] = os.environ) -> RankInfo:
    """Read what torchrun, Open MPI, MPICH or srun say; without them this is a single process.

    Raises ``ConfigError`` for variables that are no numbers.
    """
    for launcher in _LAUNCHERS:
        if launcher.rank in variables and launcher.world_size in variables:
            if launcher.name == "MPICH" and _srun_speaks_pmi(variables):
                continue
            return _place(launcher, variables)
    return RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")


def _srun_speaks_pmi(variables: Mapping[str, str]) -> bool:
    """Whether PMI's variables are those that srun sets for MPIs, and no mpirun was there."""
    started = variables.get("SLURM_STEP_NUM_TASKS")
    return started == variables["PMI_SIZE"] and "MPI_LOCALRANKID" not in variables


def _place(launcher: Launcher, variables: Mapping[str, str]) -> RankInfo:
    """What the launcher says; a node of one's own where it does not tell the local rank."""

    def number(variable: str, otherwise: str) -> int:
        text = variables.get(variable, variables[otherwise])
        if variable == "SLURM_STEP_TASKS_PER_NODE":
            text = _on_this_node(text, variables.get("SLURM_NODEID", "0"))
        if not text.isdecimal():
            remedy = f"start with {launcher.name}, which sets it"
            raise ConfigError(format_option_error(variable, text, "a whole number", remedy))
        return int(text)

    world_size = number(launcher.world_size, launcher.world_size)
    local_world_size = number(launcher.local_world_size, launcher.world_size)
    nodes = -(-world_size // max(1, local_world_size))
    if launcher.name == "srun":
        nodes = number("SLURM_STEP_NUM_NODES", launcher.world_size)
    return RankInfo(
        rank=number(launcher.rank, launcher.rank),
        world_size=world_size,
        local_rank=number(launcher.local_rank, launcher.rank),
        local_world_size=local_world_size,
        launcher=launcher.name,
        nodes=nodes,
    )


def _on_this_node(counts: str, node: str) -> str:
    """SLURM's counts by node, as in ``2(x3),1``: the one of ``node``."""
    by_node: list[str] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        by_node += [count] * int(times.rstrip(")") or 1)
    place = int(node) if node.isdecimal() else 0
    return by_node[place] if place < len(by_node) else counts


def of_caller(rank: int, world_size: int, variables: Mapping[str, str] = os.environ) -> RankInfo:
    """The place in a process group that the caller has initialised."""
    return RankInfo(
        rank=rank,
        world_size=world_size,
        local_rank=int(variables.get("LOCAL_RANK", rank)),
        local_world_size=int(variables.get("LOCAL_WORLD_SIZE", world_size)),
        launcher="the caller",
    )


def rank_hint(variables: Mapping[str, str] = os.environ) -> int:
    """The rank as far as any launcher tells it; for deciding who prints a mistake."""
    names = (launcher.rank for launcher in _LAUNCHERS)
    return next((int(variables[n]) for n in names if variables.get(n, "").isdecimal()), 0)


def patience_seconds(everyones: bool, variables: Mapping[str, str] = os.environ) -> float:
    """How long a rank that fails waits for rank 0 to speak, if the failure is ``everyones``.

    torchrun and Open MPI end all ranks as soon as one has failed; MPICH does not, and srun does
    where it is set up so.
    """
    if not everyones or "RANK" in variables:
        return 15.0
    if "MPI_LOCALRANKID" in variables:
        return 0.0
    return 3.0 if "SLURM_STEP_NUM_TASKS" in variables else 15.0


def restarts(variables: Mapping[str, str] = os.environ) -> int:
    """How often the launcher (torchrun, SLURM) has begun this job anew."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return sum(int(variables[n]) for n in names if variables.get(n, "").isdecimal())


def cpus_of_a_task(variables: Mapping[str, str] = os.environ) -> int | None:
    """CPUs that SLURM gave each task; None where it did not say."""
    text = variables.get("SLURM_CPUS_PER_TASK", "")
    return int(text) if text.isdecimal() else None


def threads(wanted: int | None, variables: Mapping[str, str] = os.environ) -> int:
    """CPU threads of a rank: as many as ``wanted``, else the CPUs of SLURM's task, else 1.

    Processes of some clusters may run on all CPUs, whatever was given to the job: then what SLURM
    says counts.  Raises ``ConfigError`` for more than this rank may use.
    """
    given = cpus_of_a_task(variables)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    most = min(usable or 1, given or usable or 1)
    if wanted is not None and wanted > most:
        allowed = f"1 to {most}, the CPUs that this rank may use"
        remedy = "ask SLURM for more with --cpus-per-task" if given else f"set threads={most}"
        raise ConfigError(format_option_error("threads", wanted, allowed, remedy))
    return wanted or (most if given else 1)


def gpus_are_of_a_task(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether SLURM shows each task GPUs of its own, so that no two share those that they see."""
    own = (
        "SLURM_GPUS_PER_TASK" in variables
        or "gpu" in variables.get("SLURM_TRES_PER_TASK", "")
        or variables.get("SLURM_NTASKS_PER_GPU") == "1"
    )
    return own and "SLURM_STEP_NUM_TASKS" in variables


def mpi_takes_gpu_memory(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether the user says so."""
    return any(variables.get(name, "").lower() in ("1", "true") for name in CUDA_AWARE)
