"""What the launcher left in the environment: this process's rank, its CPUs and GPUs.  No torch.

All rooms and tools learn ranks, restarts and CPUs from here.  Only ``distributed`` reads further
variables of launchers: the addresses of rank 0 and of SLURM's nodes.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from ..config.errors import ConfigError, format_option_error


@dataclass(frozen=True)
class Launcher:
    """The variables by which a launcher tells each process its rank."""

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
"""In order of precedence: torchrun may run inside a job of any other, and mpirun inside SLURM's."""
MPI_LAUNCHERS = {launcher.name: launcher.world_size for launcher in _LAUNCHERS[1:3]}
"""The launchers of MPI libraries, each with its variable for the world size."""
CUDA_AWARE = ("OMPI_MCA_opal_cuda_support", "MPIR_CVAR_ENABLE_GPU", "MPICH_GPU_SUPPORT_ENABLED")
"""Variables by which users say that their MPI accepts GPU memory."""


@dataclass(frozen=True)
class RankInfo:
    """Rank and world size of this process, in the job and on its node, and the launcher's name."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    nodes: int = 1
    is_on_one_node: bool = False
    """Whether the launcher says that all ranks are on this node; false where it does not say."""


def detect(variables: Mapping[str, str] = os.environ) -> RankInfo:
    """Reads the variables of torchrun, Open MPI, MPICH or srun; without them, a single process.

    Raises ``ConfigError`` if a variable is not a number.
    """
    for launcher in _LAUNCHERS:
        if launcher.name == "MPICH" and _is_pmi_of_srun(variables):
            continue
        if launcher.rank in variables and launcher.world_size in variables:
            return _rank_info(launcher, variables)
    return RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")


def _is_pmi_of_srun(variables: Mapping[str, str]) -> bool:
    """Returns whether srun set PMI's variables, as it does for MPI programs, and not mpirun."""
    tasks = variables.get("SLURM_STEP_NUM_TASKS")
    return tasks == variables.get("PMI_SIZE") and "MPI_LOCALRANKID" not in variables


def _rank_info(launcher: Launcher, variables: Mapping[str, str]) -> RankInfo:
    """Reads the launcher's variables; a launcher that sets no local ones counts as on one node."""

    def number(variable: str, otherwise: str = "") -> int:
        text = variables.get(variable, variables.get(otherwise, ""))
        if variable == "SLURM_STEP_TASKS_PER_NODE":
            text = _count_on_this_node(text, variables.get("SLURM_NODEID", "0"))
        if not text.isdecimal():
            remedy = f"start with {launcher.name}, which sets it"
            raise ConfigError(format_option_error(variable, text, "a whole number", remedy))
        return int(text)

    rank, world_size = number(launcher.rank), number(launcher.world_size)
    local_rank = number(launcher.local_rank, launcher.rank)
    local_world_size = number(launcher.local_world_size, launcher.world_size)
    nodes, says = -(-world_size // max(1, local_world_size)), launcher.local_world_size
    if launcher.name == "srun":
        says = "SLURM_STEP_NUM_NODES"
        nodes = number(says, launcher.world_size)
    is_on_one_node = nodes == 1 and says in variables
    name = launcher.name
    return RankInfo(rank, world_size, local_rank, local_world_size, name, nodes, is_on_one_node)


def _count_on_this_node(counts: str, node: str) -> str:
    """Returns the count of node number ``node`` from SLURM's list, such as ``2(x3),1``."""
    by_node: list[str] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        by_node += [count] * int(times.rstrip(")") or 1)
    number = int(node) if node.isdecimal() else 0
    return by_node[number] if number < len(by_node) else counts


def info_of_existing_group(
    rank: int, world_size: int, variables: Mapping[str, str] = os.environ
) -> RankInfo:
    """Returns this process's ``RankInfo`` in a process group that the caller has initialised."""
    local_rank = int(variables.get("LOCAL_RANK", rank))
    local_world_size = int(variables.get("LOCAL_WORLD_SIZE", world_size))
    return RankInfo(rank, world_size, local_rank, local_world_size, "the caller")


def rank_hint(variables: Mapping[str, str] = os.environ) -> int:
    """Returns the rank if any launcher tells it, else 0; it decides which rank prints."""
    ranks = (_number(launcher.rank, variables) for launcher in _LAUNCHERS)
    return next((rank for rank in ranks if rank is not None), 0)


def _number(name: str, variables: Mapping[str, str]) -> int | None:
    text = variables.get(name, "")
    return int(text) if text.isdecimal() else None


def writes_to_terminal(variables: Mapping[str, str] = os.environ) -> bool:
    """Returns whether a person sees what this process writes, so that it may draw and colour.

    Both standard streams must be terminals: Open MPI gives its ranks one for standard output even
    if its own output goes to a file, and never one for standard error.
    """
    streams = sys.stdout, sys.stderr
    is_drawn = all(stream is not None and stream.isatty() for stream in streams)
    return is_drawn and detect(variables).launcher not in MPI_LAUNCHERS


def exit_delay_seconds(on_all_ranks: bool, variables: Mapping[str, str] = os.environ) -> float:
    """Returns how long a failing rank waits for rank 0 to report the failure.

    torchrun and Open MPI end all ranks once one has failed.  MPICH does not, and srun only if the
    cluster is set up so: there a failure ``on_all_ranks`` needs a shorter wait, or none.
    """
    if on_all_ranks and "RANK" not in variables:
        if "MPI_LOCALRANKID" in variables:
            return 0.0
        if "SLURM_STEP_NUM_TASKS" in variables:
            return 3.0
    return 15.0


def restart_count(variables: Mapping[str, str] = os.environ) -> int:
    """Returns how often torchrun and SLURM have restarted this job."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return sum(_number(name, variables) or 0 for name in names)


def threads(wanted: int | None, variables: Mapping[str, str] = os.environ) -> int:
    """Returns a rank's CPU threads: ``wanted``, else the CPUs of SLURM's task, else 1.

    On some clusters processes may run on all CPUs, whatever SLURM gave to the task; SLURM's number
    is the limit there.  Raises ``ConfigError`` if ``wanted`` exceeds the CPUs of this rank.
    """
    per_task = _number("SLURM_CPUS_PER_TASK", variables)
    usable = _usable_cpus()
    most = min(usable, per_task or usable)
    if wanted is not None and wanted > most:
        allowed = f"1 to {most}, the CPUs that this rank may use"
        remedy = "ask SLURM for more with --cpus-per-task" if per_task else f"set threads={most}"
        raise ConfigError(format_option_error("threads", wanted, allowed, remedy))
    return wanted or (most if per_task else 1)


def cpus_of_rank(variables: Mapping[str, str] = os.environ) -> int:
    """Returns the CPUs of this rank: those of SLURM's task, else its share of those of the node."""
    if per_task := _number("SLURM_CPUS_PER_TASK", variables):
        return min(per_task, _usable_cpus())
    return max(1, _usable_cpus() // detect(variables).local_world_size)


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_gpus_per_task(variables: Mapping[str, str] = os.environ) -> bool:
    """Returns whether SLURM shows each task different GPUs, so that no two tasks share one."""
    is_separate = (
        "SLURM_GPUS_PER_TASK" in variables
        or "gpu" in variables.get("SLURM_TRES_PER_TASK", "")
        or variables.get("SLURM_NTASKS_PER_GPU") == "1"
    )
    return is_separate and "SLURM_STEP_NUM_TASKS" in variables


def mpi_is_cuda_aware(variables: Mapping[str, str] = os.environ) -> bool:
    """Returns whether a variable of ``CUDA_AWARE`` is set to 1 or true."""
    return any(variables.get(name, "").lower() in ("1", "true") for name in CUDA_AWARE)
