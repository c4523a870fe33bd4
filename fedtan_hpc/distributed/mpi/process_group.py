"""The collectives of torch.distributed as those of MPI; every call is done when it returns."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from .buffers import bytes_of, operation_of, raw, values_of
from .library import MPI

_ProcessGroup: Any = dist.ProcessGroup
_c10d: Any = torch._C._distributed_c10d


class MPIGroup(_ProcessGroup):  # type: ignore[misc]
    """A communicator as torch.distributed calls it; options are torch's own.

    Tensors come in lists, of which those of collectives on whole tensors have one member.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        super().__init__(comm.rank, comm.size)
        self._comm = comm
        self._name = ""

    def getBackendName(self) -> str:
        """As torch asks for it."""
        return "mpi4py"

    def setGroupName(self, name: str) -> None:
        """torch finds the group by this name in functional collectives."""
        self._name = name

    def getGroupName(self) -> str:
        """The name that was set."""
        return self._name

    @property
    def group_name(self) -> str:
        """The same."""
        return self._name

    def allreduce(self, tensors: list[Tensor], options: Any) -> Any:
        """Every tensor becomes the reduction of all ranks'."""
        for tensor in tensors:
            self._allreduce(tensor, options.reduceOp)
        return _done(tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], options: Any) -> Any:
        """The same."""
        return self.allreduce(tensors, options)

    def _allreduce(self, tensor: Tensor, operation: Any) -> None:
        with values_of(tensor) as buffer:
            self._comm.Allreduce(MPI.IN_PLACE, buffer, operation_of(operation, tensor))
        if operation == dist.ReduceOp.AVG:
            tensor.div_(self._comm.size)

    def broadcast(self, tensors: list[Tensor], options: Any) -> Any:
        """Every tensor becomes the root's."""
        for tensor in tensors:
            with bytes_of(tensor) as buffer:
                self._comm.Bcast(buffer, root=options.rootRank)
        return _done(tensors)

    def reduce(self, tensors: list[Tensor], options: Any) -> Any:
        """The root's tensor becomes the reduction of all ranks'."""
        is_root = self._comm.rank == options.rootRank
        for tensor in tensors:
            with values_of(tensor, writes=is_root) as buffer:
                operation = operation_of(options.reduceOp, tensor)
                send, receive = (MPI.IN_PLACE, buffer) if is_root else (buffer, None)
                self._comm.Reduce(send, receive, operation, root=options.rootRank)
            if is_root and options.reduceOp == dist.ReduceOp.AVG:
                tensor.div_(self._comm.size)
        return _done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Any:
        """Output r becomes rank r's input."""
        for output, tensor in zip(outputs, inputs, strict=True):
            gathered = tensor.new_empty(len(output), *tensor.shape)
            self._allgather(gathered, tensor)
            for value, part in zip(output, gathered, strict=True):
                value.copy_(part.view_as(value))
        return _done(outputs)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any
    ) -> Any:
        """The same, with the outputs by rank first."""
        by_input = [list(column) for column in zip(*outputs, strict=True)]
        self.allgather(by_input, inputs, options)
        return _done(outputs)

    def all_gather_single(self, output: Tensor, tensor: Tensor, options: Any = None) -> Any:
        """Inputs one after another in one tensor."""
        self._allgather(output, tensor)
        return _done(output)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], options: Any = None
    ) -> Any:
        """The same for several."""
        for output, tensor in zip(outputs, inputs, strict=True):
            self._allgather(output, tensor)
        return _done(outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def _allgather(self, output: Tensor, tensor: Tensor) -> None:
        with bytes_of(output) as whole, bytes_of(tensor, writes=False) as part:
            self._comm.Allgather(part, whole)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Any:
        """The root's output r becomes rank r's input."""
        is_root = self._comm.rank == options.rootRank
        for place, tensor in enumerate(inputs):
            gathered = tensor.new_empty(self._comm.size if is_root else 0, *tensor.shape)
            with bytes_of(gathered) as whole, bytes_of(tensor, writes=False) as part:
                self._comm.Gather(part, whole if is_root else None, root=options.rootRank)
            if is_root:
                for value, found in zip(outputs[place], gathered, strict=True):
                    value.copy_(found.view_as(value))
        return _done(outputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> Any:
        """Rank r's output becomes the root's input r."""
        is_root = self._comm.rank == options.rootRank
        for place, tensor in enumerate(outputs):
            whole = torch.stack(inputs[place]) if is_root else tensor.new_empty(0)
            with bytes_of(whole, writes=False) as all_parts, bytes_of(tensor) as part:
                self._comm.Scatter(all_parts if is_root else None, part, root=options.rootRank)
        return _done(outputs)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any
    ) -> Any:
        """Rank r's output becomes the reduction of all ranks' input r."""
        for output, parts in zip(outputs, inputs, strict=True):
            self._reduce_scatter(output, torch.stack(parts), options.reduceOp)
        return _done(outputs)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, options: Any) -> Any:
        """The same with the inputs one after another in one tensor."""
        self._reduce_scatter(output, tensor, options.reduceOp)
        return _done(output)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], options: Any
    ) -> Any:
        """The same for several."""
        for output, tensor in zip(outputs, inputs, strict=True):
            self._reduce_scatter(output, tensor, options.reduceOp)
        return _done(outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _reduce_scatter(self, output: Tensor, tensor: Tensor, operation: Any) -> None:
        with values_of(output) as part, values_of(tensor, writes=False) as whole:
            self._comm.Reduce_scatter_block(whole, part, operation_of(operation, tensor))
        if operation == dist.ReduceOp.AVG:
            output.div_(self._comm.size)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], options: Any) -> Any:
        """Output r becomes rank r's input for this rank; shapes may differ from pair to pair."""
        received = [output.new_empty(output.shape) for output in outputs]
        sent = [tensor.detach().contiguous() for tensor in inputs]
        requests = [self._comm.Irecv(raw(t), source=rank) for rank, t in enumerate(received)]
        requests += [self._comm.Isend(raw(t), dest=rank) for rank, t in enumerate(sent)]
        MPI.Request.Waitall(requests)
        for output, tensor in zip(outputs, received, strict=True):
            output.copy_(tensor)
        return _done(outputs)

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, outs: list[int], ins: list[int], options: Any = None
    ) -> Any:
        """The same with the parts one after another; equal parts if no sizes are given."""
        size = self._comm.size
        outs = list(outs) or [len(output) // size] * size
        ins = list(ins) or [len(tensor) // size] * size
        self.alltoall(list(output.split(outs)), list(tensor.split(ins)), options)
        return _done(output)

    alltoall_base = all_to_all_single

    def send(self, tensors: list[Tensor], rank: int, tag: int = 0) -> Any:
        """Send to ``rank``; returns when the buffer may be used again."""
        for tensor in tensors:
            with bytes_of(tensor, writes=False) as buffer:
                self._comm.Send(buffer, dest=rank, tag=tag)
        return _done(tensors)

    def recv(self, tensors: list[Tensor], rank: int, tag: int = 0) -> Any:
        """Receive from ``rank``."""
        for tensor in tensors:
            with bytes_of(tensor) as buffer:
                self._comm.Recv(buffer, source=rank, tag=tag)
        return _done(tensors)

    def barrier(self, opts: Any = None) -> Any:
        """Wait for all ranks of the group."""
        self._comm.Barrier()
        return _done([])

    def shutdown(self) -> None:
        """Let the communicator go."""
        if self._comm != MPI.COMM_NULL and not MPI.Is_finalized():
            self._comm.Free()


def _done(result: Any) -> Any:
    """A finished work item, as torch wants it."""
    future: Future[Any] = Future()
    future.set_result(result)
    return _c10d._create_work_from_future(future)
