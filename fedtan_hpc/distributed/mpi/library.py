"""The MPI library: loaded by mpi4py, seen to be the launcher's own, and then initialised."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import mpi4py

from ...config.errors import LauncherError, format_option_error
from ...runtime.launcher_env import MPI_LAUNCHERS, detect

mpi4py.rc(initialize=False, finalize=True)  # a library may abort under another MPI's launcher
with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # says less than we do
    from mpi4py import MPI

__all__ = ["MPI", "check_launcher", "initialise"]


def initialise(variables: Mapping[str, str] = os.environ) -> None:
    """Initialise MPI for calls from any thread, if nobody has yet.

    Raises ``LauncherError`` if the launcher is another MPI's, under which every process would take
    itself for rank 0 of 1 or abort, or if threads may not call this one.
    """
    check_launcher(MPI.Get_library_version(), variables)
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    _check_size(variables)
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        allowed = "serialized or multiple, for clients of a rank run in several threads"
        remedy = "initialise MPI with MPI_THREAD_MULTIPLE, or use comm.backend=gloo"
        raise LauncherError(
            format_option_error("MPI's thread level", MPI.Query_thread(), allowed, remedy)
        )


def check_launcher(version: str, variables: Mapping[str, str]) -> None:
    """Raise ``LauncherError`` if the library of ``version`` is not the MPI that set variables."""
    for launcher, variable in MPI_LAUNCHERS.items():
        others = [name for name in MPI_LAUNCHERS if name != launcher and name in version]
        if variable in variables and others:
            raise LauncherError(_mistake(variable, variables[variable], launcher, version))


def _check_size(variables: Mapping[str, str]) -> None:
    """The same for libraries without a name that is known, and for srun."""
    size, version = MPI.COMM_WORLD.size, MPI.Get_library_version()
    for launcher, variable in MPI_LAUNCHERS.items():
        if variables.get(variable, str(size)) != str(size):
            raise LauncherError(_mistake(variable, variables[variable], launcher, version))
    if detect(variables).world_size == size:
        return
    allowed = f"a start by mpirun, or by `srun --mpi=...` in a way that {_library(version)} speaks"
    remedy = "`srun --mpi=list` tells which there are, or set comm.backend=gloo"
    raise LauncherError(format_option_error("comm.backend", "mpi", allowed, remedy))


def _mistake(variable: str, value: str, launcher: str, version: str) -> str:
    allowed = f"the launcher of {_library(version)}, the MPI that mpi4py loads"
    remedy = f"start with its mpirun and not with {launcher}'s, or install {launcher}"
    return format_option_error(variable, value, allowed, remedy)


def _library(version: str) -> str:
    return " ".join(version.splitlines()[0].partition(",")[0].split())
