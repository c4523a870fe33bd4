"""Which rank this process is, from what its launcher left in the environment.  No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError, mistake

# Launchers that this module does not take ranks from yet: the variable with the world size.
_UNREAD_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "MPICH's mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
}


@dataclass(frozen=True)
class RankInfo:
    """The place of this process: ``rank`` of ``world_size``, ``local_rank`` on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str


def detect(variables: Mapping[str, str] = os.environ) -> RankInfo:
    """Read torchrun's variables; without them this is a single process.

    Raises ``ConfigError`` under a launcher whose ranks would all take themselves for rank 0.
    """
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if not variables.get(variable, "0").isdecimal():
            remedy = "start with torchrun, which sets it"
            raise ConfigError(mistake(variable, variables[variable], "a whole number", remedy))
    if "RANK" in variables and "WORLD_SIZE" in variables:
        return RankInfo(
            rank=int(variables["RANK"]),
            world_size=int(variables["WORLD_SIZE"]),
            local_rank=int(variables.get("LOCAL_RANK", variables["RANK"])),
            local_world_size=int(variables.get("LOCAL_WORLD_SIZE", variables["WORLD_SIZE"])),
            launcher="torchrun",
        )
    for variable, launcher in _UNREAD_LAUNCHERS.items():
        if int(variables.get(variable, "1")) > 1:
            raise ConfigError(
                mistake(
                    variable,
                    variables[variable],
                    "1, or a start by torchrun",
                    f"{launcher} started several processes that would not find each other: "
                    "start `torchrun --nproc-per-node N -m fedtan_hpc` on each node instead",
                )
            )
    return RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")


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
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((int(variables[n]) for n in names if variables.get(n, "").isdecimal()), 0)
