"""What all methods of a process group over MPI need: its names, its time-out, and the works.

``mpi.process_group`` adds torch's operations.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .agreement import Agreement
from .library import MPI
from .waiting import has_failed
from .work import MPIWork, ProfilerEvent, look_at_all

NAME = "mpi4py"
"""Name of the backend in torch.distributed; torch's compiled MPI backend is called mpi."""
_ProcessGroup: Any = dist.ProcessGroup
_ZERO = timedelta(0)
profiler_enabled: Any = torch._C._autograd._profiler_enabled


class Communicator(_ProcessGroup):  # type: ignore[misc]
    """A communicator of MPI under the names by which torch.distributed asks for its properties."""

    def __init__(self, comm: MPI.Intracomm, timeout: timedelta) -> None:
        super().__init__(comm.rank, comm.size)
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._comm = comm
        self._timeout = timeout
        self._name = ""
        # Messages of all_to_all must not meet those that the user sends.
        self._all_to_all_tag = comm.Get_attr(MPI.TAG_UB)

    def getBackendName(self) -> str:
        """Returns the name under which the backend is registered."""
        return NAME

    def setGroupName(self, name: str) -> None:
        """Sets the name under which torch's functional collectives look the group up."""
        self._name = name

    def getGroupName(self) -> str:
        """Returns the name that torch has set."""
        return self._name

    group_name = property(getGroupName)

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets how long an operation may take that is not given a time-out."""
        self._timeout = timeout

    def seconds_of(self, options: Any) -> float:
        """Returns how long an operation with torch's ``options``, or without, may take."""
        timeout = self._timeout if options is None else options.timeout
        return (timeout if timeout > _ZERO else self._timeout).total_seconds()

    def title(self, name: str) -> str:
        """Returns the name of an operation with this rank and group, for messages."""
        return f"{name} of rank {self._comm.rank} (group {self._name}, {self._comm.size} ranks)"

    def begin_message(self, name: str, tensors: Any, peer: str, options: Any = None) -> MPIWork:
        """Returns a work of which the profiler shows ``name`` and the sizes of ``tensors``."""
        look_at_all()
        event = ProfilerEvent(f"{NAME}:{name}", tensors) if profiler_enabled() else None
        return MPIWork(self.title(name + peer), self.seconds_of(options), event)

    def begin(self, name: str, inputs: Any, options: Any, equal: Any = None) -> MPIWork:
        """Returns a collective's work; ``equal``, else the inputs, have one size on all ranks."""
        work = self.begin_message(name, inputs, "", options)
        size = sum(tensor.nbytes for tensor in (inputs if equal is None else equal))
        work.needs_agreement(Agreement(self._comm, name, size))
        return work

    def shutdown(self) -> None:
        """Frees the communicator, unless messages are lost or under way."""
        if look_at_all() or has_failed() or MPI.Is_finalized():
            return
        if self._comm != MPI.COMM_NULL:
            self._comm.Free()
