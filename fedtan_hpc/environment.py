"""Which rank this process is, from what its launcher left in the environment.  No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError, mistake


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
)
"""In the order of asking: torchrun may run inside a job of any other."""
MPI_LAUNCHERS = {launcher.name: launcher.world_size for launcher in _LAUNCHERS[1:]}
"""Those of MPIs, and how many processes they say that they started."""

CUDA_AWARE = ("OMPI_MCA_opal_cuda_support", "MPIR_CVAR_ENABLE_GPU", "MPICH_GPU_SUPPORT_ENABLED")
"""Variables by which users say that their MPI takes memory of a GPU."""

# Launchers that this module does not take ranks from yet: the variable with the world size.
_UNREAD_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun"}


@dataclass(frozen=True)
class RankInfo:
    """The place of this process: ``rank`` of ``world_size``, ``local_rank`` on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str


def detect(variables: Mapping[str, str] = os.environ) -> RankInfo:
    """Read what torchrun, Open MPI or MPICH say; without them this is a single process.

    Raises ``ConfigError`` for variables that are no numbers, and under a launcher whose ranks would
    all take themselves for rank 0.
    """
    for launcher in _LAUNCHERS:
        if launcher.rank in variables and launcher.world_size in variables:
            return _place(launcher, variables)
    for variable, name in _UNREAD_LAUNCHERS.items():
        if int(variables.get(variable, "1")) > 1:
            raise ConfigError(
                mistake(
                    variable,
                    variables[variable],
                    "1, or a start by torchrun",
                    f"{name} started several processes that would not find each other: "
                    "start `torchrun --nproc-per-node N -m fedtan_hpc` on each node instead",
                )
            )
    return RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")


def _place(launcher: Launcher, variables: Mapping[str, str]) -> RankInfo:
    """What the launcher says; a node of one's own where it does not tell the local rank."""

    def number(variable: str, otherwise: str) -> int:
        text = variables.get(variable, variables[otherwise])
        if not text.isdecimal():
            remedy = f"start with {launcher.name}, which sets it"
            raise ConfigError(mistake(variable, text, "a whole number", remedy))
        return int(text)

    return RankInfo(
        rank=number(launcher.rank, launcher.rank),
        world_size=number(launcher.world_size, launcher.world_size),
        local_rank=number(launcher.local_rank, launcher.rank),
        local_world_size=number(launcher.local_world_size, launcher.world_size),
        launcher=launcher.name,
    )


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
    names = (*(launcher.rank for launcher in _LAUNCHERS), "SLURM_PROCID")
    return next((int(variables[n]) for n in names if variables.get(n, "").isdecimal()), 0)


def lets_others_live(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher waits for the other ranks when one leaves with an error: MPICH's."""
    return "PMI_RANK" in variables and "RANK" not in variables


def mpi_takes_gpu_memory(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether the user says so."""
    return any(variables.get(name, "").lower() in ("1", "true") for name in CUDA_AWARE)
