"""torch.distributed's process group over an MPI communicator; no method waits for other ranks.

The one exception is a sum that the caller waits for at once: MPI's blocking all-reduce is the
fastest, and FedTAN's time is that of small sums.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .buffers import MPIBuffer, copy_all, finish_mean, mpi_operation
from .calls import collective
from .communicator import Communicator, profiler_enabled
from .library import MPI
from .sparse import sum_sparse
from .waiting import Guard
from .work import CompletedWork, MPIWork, failed

Tensors: TypeAlias = list[Tensor]
_Parts: TypeAlias = Sequence[Tensor]


def create_group(options: Any, _: Any = None) -> Any:
    """Returns a process group over MPI of the ranks in torch's ``options``, in their order.

    Ends the job if a rank does not join within the time-out in ``options``.
    """
    ranks, world = list(options.global_ranks_in_group), MPI.COMM_WORLD
    with Guard(lambda: (f"new_group of rank {world.rank}", options.timeout.total_seconds())):
        if not ranks or ranks == list(range(world.size)):
            comm = world.Dup()
        else:
            comm = world.Create_group(world.group.Incl(ranks))
    return _MPIGroup(comm, options.timeout)


class _MPIGroup(Communicator):
    """A communicator with the methods that torch.distributed calls, under torch's names.

    ``options`` are torch's.  Most collectives take lists of tensors, which seldom have more than
    one member; each member is one collective of MPI.
    """

    @collective("AllreduceOptions", 1, "op", "timeout")
    def allreduce(self, tensors: Tensors, options: Any) -> Any:
        if getattr(options, "asyncOp", True) or tensors[0].is_sparse or profiler_enabled():
            return self._start_allreduce(tensors, options)
        operation = options.reduceOp
        try:
            with Guard(lambda: (self.title("all_reduce"), self.seconds_of(options))):
                for tensor in tensors:
                    buffer = MPIBuffer(tensor, reduces=True)
                    mpi_name = mpi_operation(operation, tensor)
                    self._comm.Allreduce(MPI.IN_PLACE, buffer.memory, mpi_name)
                    buffer.write_back()
                    finish_mean(tensor, operation, self._comm.size)
        except MPI.Exception as error:
            raise failed(self.title("all_reduce"), error) from None
        return CompletedWork(tensors)

    def _start_allreduce(self, tensors: Tensors, options: Any) -> Any:
        if any(tensor.is_sparse for tensor in tensors):
            for tensor in tensors:
                sum_sparse(tensor, options.reduceOp, self._gather_rows)
            return CompletedWork(tensors)
        work = self.begin("all_reduce", tensors, options)
        for tensor in tensors:
            operation = mpi_operation(options.reduceOp, tensor)
            memory = work.writes(tensor, reduces=True)
            work.start(self._comm.Iallreduce, MPI.IN_PLACE, memory, operation)
            work.then(partial(finish_mean, tensor, options.reduceOp, self._comm.size))
        return work.returns(tensors)

    allreduce_coalesced = collective("AllreduceCoalescedOptions", 1)(_start_allreduce)

    def _gather_rows(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all ranks, stacked by rank."""
        gathered = tensor.new_empty(self._comm.size, *tensor.shape)
        self.all_gather_single(gathered, tensor).wait()
        return gathered

    @collective("BroadcastOptions", 1, "root", "timeout")
    def broadcast(self, tensors: Tensors, options: Any) -> Any:
        work = self.begin("broadcast", tensors, options)
        for tensor in tensors:
            work.start(self._comm.Ibcast, work.writes(tensor), root=options.rootRank)
        return work.returns(tensors)

    @collective("ReduceOptions", 1, "root", "op", "timeout")
    def reduce(self, tensors: Tensors, options: Any) -> Any:
        work, root = self.begin("reduce", tensors, options), options.rootRank
        for tensor in tensors:
            operation = mpi_operation(options.reduceOp, tensor)
            if self._comm.rank == root:
                memory = work.writes(tensor, reduces=True)
                work.start(self._comm.Ireduce, MPI.IN_PLACE, memory, operation, root=root)
                work.then(partial(finish_mean, tensor, options.reduceOp, self._comm.size))
            else:
                memory = work.reads(tensor, reduces=True)
                work.start(self._comm.Ireduce, memory, None, operation, root=root)
        return work.returns(tensors)

    @collective("AllgatherOptions", 2, "timeout")
    def allgather(self, outputs: list[Tensors], inputs: Tensors, options: Any) -> Any:
        """Copies the input of rank r into the r-th tensor of the output."""
        work = self.begin("all_gather", inputs, options)
        for output, tensor in zip(outputs, inputs, strict=True):
            gathered = tensor.new_empty(len(output), *tensor.shape)
            self._start_gather_of_all(work, gathered, tensor)
            work.then(partial(copy_all, output, gathered))
        return work.returns(outputs)

    @collective("AllgatherOptions", 2)
    def allgather_coalesced(self, outputs: list[Tensors], inputs: Tensors, options: Any) -> Any:
        """Copies the inputs of rank r into the list outputs[r]."""
        columns = [list(column) for column in zip(*outputs, strict=True)]
        return self.allgather(columns, inputs, options).returns(outputs)

    def _start_gather_of_all(self, work: MPIWork, output: Tensor, tensor: Tensor) -> None:
        work.start(self._comm.Iallgather, work.reads(tensor), work.writes(output))

    @collective("AllgatherOptions", 2, "timeout", listed=False)
    def all_gather_single(self, output: Tensor, tensor: Tensor, options: Any) -> Any:
        """Copies the tensors of all ranks, by rank, into the one tensor ``output``."""
        work = self.begin("_all_gather_base", [tensor], options)
        self._start_gather_of_all(work, output, tensor)
        return work.returns(output)

    @collective("AllgatherOptions", 2)
    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, options: Any) -> Any:
        """Is ``all_gather_single`` for each pair of an output and an input."""
        work = self.begin("_all_gather_base", inputs, options)
        for output, tensor in zip(outputs, inputs, strict=True):
            self._start_gather_of_all(work, output, tensor)
        return work.returns(outputs)

    @collective("GatherOptions", 2, "root", "timeout")
    def gather(self, outputs: list[Tensors], inputs: Tensors, options: Any) -> Any:
        """Copies the input of rank r into the r-th tensor of the root's output."""
        work, root = self.begin("gather", inputs, options), options.rootRank
        for number, tensor in enumerate(inputs):
            rows = None
            if self._comm.rank == root:
                gathered = tensor.new_empty(self._comm.size, *tensor.shape)
                rows = work.writes(gathered)
                work.then(partial(copy_all, outputs[number], gathered))
            work.start(self._comm.Igather, work.reads(tensor), rows, root=root)
        return work.returns(outputs)

    @collective("ScatterOptions", 2, "root", "timeout")
    def scatter(self, outputs: Tensors, inputs: list[Tensors], options: Any) -> Any:
        """Copies the r-th tensor of the root's input into the output of rank r."""
        work, root = (
            self.begin("scatter", list(chain(*inputs)), options, outputs),
            options.rootRank,
        )
        for number, tensor in enumerate(outputs):
            is_root = self._comm.rank == root
            rows = work.reads(torch.stack(inputs[number])) if is_root else None
            work.start(self._comm.Iscatter, rows, work.writes(tensor), root=root)
        return work.returns(outputs)

    @collective("ReduceScatterOptions", 2, "op", "timeout", listed=False)
    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, options: Any) -> Any:
        """Overwrites the output of rank r with the reduction of the r-th part of all inputs."""
        work = self.reduce_scatter_single_coalesced([output], [tensor], options)
        return work.returns(output)

    @collective("ReduceScatterOptions", 2)
    def reduce_scatter_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, options: Any
    ) -> Any:
        """Is ``reduce_scatter_single`` for each pair of an output and an input."""
        work = self.begin("reduce_scatter", inputs, options)
        for output, tensor in zip(outputs, inputs, strict=True):
            rows, row = work.reads(tensor, reduces=True), work.writes(output, reduces=True)
            operation = mpi_operation(options.reduceOp, tensor)
            work.start(self._comm.Ireduce_scatter_block, rows, row, operation)
            work.then(partial(finish_mean, output, options.reduceOp, self._comm.size))
        return work.returns(outputs)

    @collective("ReduceScatterOptions", 2, "op", "timeout")
    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], options: Any) -> Any:
        stacked = [torch.stack(parts) for parts in inputs]
        return self.reduce_scatter_single_coalesced(outputs, stacked, options)

    @collective("AllToAllOptions", 2, "timeout", listed=False)
    def alltoall(self, outputs: Tensors, inputs: Tensors, options: Any) -> Any:
        """Copies rank r's input for this rank into output r; each pair has its own shape."""
        work = self.begin("all_to_all", inputs, options, ())
        self._start_exchange(work, outputs, inputs)
        return work.returns(outputs)

    def _start_exchange(
        self, work: MPIWork, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> None:
        for rank, tensor in enumerate(outputs):
            memory = work.writes(tensor)
            work.start(self._comm.Irecv, memory, source=rank, tag=self._all_to_all_tag)
        for rank, tensor in enumerate(inputs):
            work.start(self._comm.Isend, work.reads(tensor), dest=rank, tag=self._all_to_all_tag)

    @collective("AllToAllOptions", 4, "timeout", listed=False)
    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, outs: list[int], ins: list[int], options: Any
    ) -> Any:
        """Sends ``ins[r]`` rows to rank r, receives ``outs[r]``; equal parts without sizes."""
        size = self._comm.size
        outs = list(outs) or [len(output) // size] * size
        ins = list(ins) or [len(tensor) // size] * size
        work = self.begin("all_to_all", [tensor], options, ())
        self._start_exchange(work, output.split(outs), tensor.split(ins))
        return work.returns(output)

    # Names in torch before 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def send(self, tensors: Tensors, rank: int, tag: int = 0) -> Any:
        """Sends; once the work is done the tensors may be changed."""
        work = self.begin_message("send", tensors, f" to rank {rank}")
        for tensor in tensors:
            work.start(self._comm.Isend, work.reads(tensor), dest=rank, tag=tag)
        return work.returns(tensors)

    def recv(self, tensors: Tensors, rank: int, tag: int = 0) -> Any:
        return self._receive("recv", tensors, rank, tag)

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Any:
        return self._receive("recvAnySource", tensors, MPI.ANY_SOURCE, tag)

    def _receive(self, name: str, tensors: Tensors, source: int, tag: int) -> Any:
        peer = "" if source == MPI.ANY_SOURCE else f" from rank {source}"
        work = self.begin_message(name, tensors, peer)
        for tensor in tensors:
            work.start(self._comm.Irecv, work.writes(tensor), source=source, tag=tag)
        return work.returns(tensors)

    @collective("BarrierOptions", 0, "timeout")
    def barrier(self, options: Any) -> Any:
        return self.begin("barrier", [], options).returns([])  # all ranks must agree
