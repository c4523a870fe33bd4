"""torch.distributed's collectives as those of MPI; each one is complete when its call returns."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from .buffers import mpi_buffer, mpi_operation, raw_buffer
from .library import MPI

Tensors: TypeAlias = list[Tensor]

_ProcessGroup: Any = dist.ProcessGroup
_c10d: Any = torch._C._distributed_c10d


def create_group(options: Any, _: Any = None) -> Any:
    """Returns a process group over MPI of the ranks in torch's ``options``, in their order."""
    ranks = list(options.global_ranks_in_group)
    world = MPI.COMM_WORLD
    if not ranks or ranks == list(range(world.size)):
        return _MPIGroup(world.Dup())
    return _MPIGroup(world.Create_group(world.group.Incl(ranks)))


def _done(result: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(result)
    return _c10d._create_work_from_future(future)


def _copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source.view_as(target))


def _for_each(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the variant of ``collective`` that takes a list of outputs and one of inputs."""

    def coalesced(group: Any, outputs: Tensors, inputs: Tensors, options: Any = None) -> Any:
        for output, tensor in zip(outputs, inputs, strict=True):
            collective(group, output, tensor, options)
        return _done(outputs)

    return coalesced


class _MPIGroup(_ProcessGroup):  # type: ignore[misc]
    """A communicator with the methods that torch.distributed calls, under torch's names.

    ``options`` are torch's.  Most collectives take lists of tensors, which seldom have more than
    one member; each member is one collective of MPI.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        super().__init__(comm.rank, comm.size)
        self._comm = comm
        self._name = ""

    def getBackendName(self) -> str:
        return "mpi4py"

    def setGroupName(self, name: str) -> None:
        """Sets the name under which torch's functional collectives look the group up."""
        self._name = name

    def getGroupName(self) -> str:
        return self._name

    group_name = property(getGroupName)

    def allreduce(self, tensors: Tensors, options: Any) -> Any:
        for tensor in tensors:
            with mpi_buffer(tensor, reduces=True) as buffer:
                operation = mpi_operation(options.reduceOp, tensor)
                self._comm.Allreduce(MPI.IN_PLACE, buffer, operation)
            self._finish_mean(tensor, options)
        return _done(tensors)

    allreduce_coalesced = allreduce

    def _finish_mean(self, tensor: Tensor, options: Any) -> None:
        if options.reduceOp == dist.ReduceOp.AVG:
            tensor.div_(self._comm.size)

    def broadcast(self, tensors: Tensors, options: Any) -> Any:
        for tensor in tensors:
            with mpi_buffer(tensor) as buffer:
                self._comm.Bcast(buffer, root=options.rootRank)
        return _done(tensors)

    def reduce(self, tensors: Tensors, options: Any) -> Any:
        is_root = self._comm.rank == options.rootRank
        for tensor in tensors:
            with mpi_buffer(tensor, writes=is_root, reduces=True) as buffer:
                operation = mpi_operation(options.reduceOp, tensor)
                send, receive = (MPI.IN_PLACE, buffer) if is_root else (buffer, None)
                self._comm.Reduce(send, receive, operation, root=options.rootRank)
            if is_root:
                self._finish_mean(tensor, options)
        return _done(tensors)

    def allgather(self, outputs: list[Tensors], inputs: Tensors, options: Any) -> Any:
        """Copies the input of rank r into the r-th tensor of the output."""
        for output, tensor in zip(outputs, inputs, strict=True):
            gathered = tensor.new_empty(len(output), *tensor.shape)
            self.all_gather_single(gathered, tensor)
            _copy_all(output, gathered)
        return _done(outputs)

    def allgather_coalesced(self, outputs: list[Tensors], inputs: Tensors, options: Any) -> Any:
        """Copies the inputs of rank r into the list outputs[r]."""
        self.allgather([list(column) for column in zip(*outputs, strict=True)], inputs, options)
        return _done(outputs)

    def all_gather_single(self, output: Tensor, tensor: Tensor, options: Any = None) -> Any:
        """Copies the tensors of all ranks, by rank, into the one tensor ``output``."""
        with mpi_buffer(output) as rows, mpi_buffer(tensor, writes=False) as row:
            self._comm.Allgather(row, rows)
        return _done(output)

    _allgather_base = all_gather_single
    all_gather_single_coalesced = _for_each(all_gather_single)
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(self, outputs: list[Tensors], inputs: Tensors, options: Any) -> Any:
        """Copies the input of rank r into the r-th tensor of the root's output."""
        is_root = self._comm.rank == options.rootRank
        for number, tensor in enumerate(inputs):
            gathered = tensor.new_empty(self._comm.size if is_root else 0, *tensor.shape)
            with mpi_buffer(gathered) as rows, mpi_buffer(tensor, writes=False) as row:
                self._comm.Gather(row, rows if is_root else None, root=options.rootRank)
            if is_root:
                _copy_all(outputs[number], gathered)
        return _done(outputs)

    def scatter(self, outputs: Tensors, inputs: list[Tensors], options: Any) -> Any:
        """Copies the r-th tensor of the root's input into the output of rank r."""
        is_root = self._comm.rank == options.rootRank
        for number, tensor in enumerate(outputs):
            stacked = torch.stack(inputs[number]) if is_root else tensor.new_empty(0)
            with mpi_buffer(stacked, writes=False) as rows, mpi_buffer(tensor) as row:
                self._comm.Scatter(rows if is_root else None, row, root=options.rootRank)
        return _done(outputs)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, options: Any) -> Any:
        """Overwrites the output of rank r with the reduction of the r-th part of all inputs."""
        with (
            mpi_buffer(output, reduces=True) as row,
            mpi_buffer(tensor, writes=False, reduces=True) as rows,
        ):
            self._comm.Reduce_scatter_block(rows, row, mpi_operation(options.reduceOp, tensor))
        self._finish_mean(output, options)
        return _done(output)

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_single_coalesced = _for_each(reduce_scatter_single)
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], options: Any) -> Any:
        stacked = [torch.stack(parts) for parts in inputs]
        return self.reduce_scatter_single_coalesced(outputs, stacked, options)

    def alltoall(self, outputs: Tensors, inputs: Tensors, options: Any) -> Any:
        """Copies rank r's input for this rank into output r; each pair has its own shape."""
        received = [output.new_empty(output.shape) for output in outputs]
        sent = [tensor.detach().contiguous() for tensor in inputs]
        requests = [self._comm.Irecv(raw_buffer(t), source=rank) for rank, t in enumerate(received)]
        requests += [self._comm.Isend(raw_buffer(t), dest=rank) for rank, t in enumerate(sent)]
        MPI.Request.Waitall(requests)
        _copy_all(outputs, received)
        return _done(outputs)

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, outs: list[int], ins: list[int], options: Any = None
    ) -> Any:
        """Sends ``ins[r]`` rows to rank r, receives ``outs[r]``; equal parts without sizes."""
        size = self._comm.size
        outs = list(outs) or [len(output) // size] * size
        ins = list(ins) or [len(tensor) // size] * size
        self.alltoall(list(output.split(outs)), list(tensor.split(ins)), options)
        return _done(output)

    alltoall_base = all_to_all_single

    def send(self, tensors: Tensors, rank: int, tag: int = 0) -> Any:
        """Returns when the tensors may be changed."""
        for tensor in tensors:
            with mpi_buffer(tensor, writes=False) as buffer:
                self._comm.Send(buffer, dest=rank, tag=tag)
        return _done(tensors)

    def recv(self, tensors: Tensors, rank: int, tag: int = 0) -> Any:
        for tensor in tensors:
            with mpi_buffer(tensor) as buffer:
                self._comm.Recv(buffer, source=rank, tag=tag)
        return _done(tensors)

    def barrier(self, opts: Any = None) -> Any:
        self._comm.Barrier()
        return _done([])

    def shutdown(self) -> None:
        """Frees the communicator."""
        if self._comm != MPI.COMM_NULL and not MPI.Is_finalized():
            self._comm.Free()
