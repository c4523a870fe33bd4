"""The MPI library: loaded by mpi4py, checked against the launcher, then initialised.

The other modules of ``mpi`` import ``MPI`` from here.  Who imports this module must initialise MPI:
mpi4py, once loaded, does not.  So ``backend`` loads it when a process group starts.
"""

import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mpi4py

from ...config.errors import LauncherError, format_option_error
from ...runtime.launcher_env import MPI_LAUNCHERS, detect


@contextmanager
def _initialised_later() -> Iterator[None]:
    """Lets mpi4py load without MPI_Init, which may abort under another MPI's launcher."""
    rc = mpi4py.rc
    before = rc.initialize, rc.finalize
    rc.initialize, rc.finalize = False, True
    try:
        yield
    finally:
        rc.initialize, rc.finalize = before


with warnings.catch_warnings(), _initialised_later():
    warnings.simplefilter("ignore", RuntimeWarning)  # our own check says more
    from mpi4py import MPI

__all__ = ["MPI", "abort", "check_launcher", "initialise"]

_MESSAGE_SECONDS = 1.0
"""Time for mpiexec to pass on the last message; MPICH drops what it reads after an abort."""


def abort(code: int) -> None:
    """Ends all processes of the job with exit code ``code``; without this they would hang."""
    if MPI.Is_initialized() and not MPI.Is_finalized():
        time.sleep(_MESSAGE_SECONDS)
        MPI.COMM_WORLD.Abort(code)


def initialise(variables: Mapping[str, str] = os.environ) -> None:
    """Initialises MPI for calls from any thread, unless it is initialised already.

    Raises ``LauncherError`` if another MPI's launcher started the processes (each would take itself
    for rank 0 of 1, or abort), or if this MPI allows calls from one thread only.
    """
    version = MPI.Get_library_version()
    check_launcher(version, variables)
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    size, threads = MPI.COMM_WORLD.size, MPI.Query_thread()
    check_launcher(version, variables, size)
    if detect(variables).world_size != size:  # srun without MPI, or no launcher
        allowed = f"a start by mpirun, or by `srun --mpi=...` in a way that {_name(version)} speaks"
        remedy = "choose a way that `srun --mpi=list` prints, or set comm.backend=gloo"
        raise LauncherError(format_option_error("comm.backend", "mpi", allowed, remedy))
    if threads < MPI.THREAD_SERIALIZED:
        allowed = "serialized or multiple, because clients of a rank run in several threads"
        remedy = "initialise MPI with MPI_THREAD_MULTIPLE, or use comm.backend=gloo"
        raise LauncherError(format_option_error("MPI's thread level", threads, allowed, remedy))


def check_launcher(version: str, variables: Mapping[str, str], size: int | None = None) -> None:
    """Raises ``LauncherError`` if ``variables`` are those of another MPI's launcher.

    ``version`` is the version text of the MPI library.  Its world size, ``size``, also reveals
    libraries whose version text does not tell which MPI they are.
    """
    for launcher, variable in MPI_LAUNCHERS.items():
        started = variables.get(variable)
        is_other = any(name in version for name in MPI_LAUNCHERS if name != launcher)
        if started is not None and (is_other or (size is not None and started != str(size))):
            allowed = f"the launcher of {_name(version)}, the MPI that mpi4py loads"
            remedy = f"start with its mpirun and not with {launcher}'s, or install {launcher}"
            raise LauncherError(format_option_error(variable, started, allowed, remedy))


def _name(version: str) -> str:
    return " ".join(version.splitlines()[0].partition(",")[0].split())
