"""Tensors as buffers of MPI: views where the tensor is contiguous, else copies.

``mpi.process_group`` passes every tensor through these functions.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...runtime.launcher_env import CUDA_AWARE, mpi_is_cuda_aware
from .library import MPI

_OPERATIONS = {
    dist.ReduceOp.SUM: MPI.SUM,
    dist.ReduceOp.AVG: MPI.SUM,
    dist.ReduceOp.PRODUCT: MPI.PROD,
    dist.ReduceOp.MIN: MPI.MIN,
    dist.ReduceOp.MAX: MPI.MAX,
    dist.ReduceOp.BAND: MPI.BAND,
    dist.ReduceOp.BOR: MPI.BOR,
    dist.ReduceOp.BXOR: MPI.BXOR,
}
_BOOL_OPERATIONS = {
    dist.ReduceOp.SUM: MPI.LOR,
    dist.ReduceOp.MAX: MPI.LOR,
    dist.ReduceOp.BOR: MPI.LOR,
    dist.ReduceOp.PRODUCT: MPI.LAND,
    dist.ReduceOp.MIN: MPI.LAND,
    dist.ReduceOp.BAND: MPI.LAND,
    dist.ReduceOp.BXOR: MPI.LXOR,
}
_BITWISE = (MPI.BAND, MPI.BOR, MPI.BXOR)
_HALF = (torch.bfloat16, torch.float16)


def mpi_operation(operation: Any, tensor: Tensor) -> MPI.Op:
    """Returns MPI's name of torch's reduction; sums and products of bool are or and and.

    Raises ``ValueError`` for a reduction that MPI does not have, or not for the tensor's dtype.
    """
    table = _BOOL_OPERATIONS if tensor.dtype is torch.bool else _OPERATIONS
    for known, mpi_name in table.items():
        if operation == known:
            if mpi_name in _BITWISE and (tensor.is_floating_point() or tensor.is_complex()):
                raise ValueError(f"{_name(operation)} is for integers and bool, not {tensor.dtype}")
            return mpi_name
    remedy = "" if tensor.dtype is torch.bool else "; multiply before summing"
    raise ValueError(f"MPI has no {_name(operation)} of {tensor.dtype}{remedy}")


def _name(operation: Any) -> str:
    return str(getattr(operation, "op", operation)).rpartition(".")[2]


def finish_mean(tensor: Tensor, operation: Any, ranks: int) -> None:
    """Makes a sum over ranks their mean if ``operation`` is AVG; towards zero for integers."""
    if operation == dist.ReduceOp.AVG:
        is_exact = tensor.is_floating_point() or tensor.is_complex()
        tensor.detach().div_(ranks, rounding_mode=None if is_exact else "trunc")


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copies each source to the target of as many values."""
    for target, source in zip(targets, sources, strict=True):
        target.detach().copy_(source.view_as(target))


class MPIBuffer:
    """A tensor as MPI takes it, in ``memory``: the tensor's memory if contiguous, else a copy.

    With ``reduces``, MPI sees values that it can add up, in float32 for half precision; otherwise
    it sees bytes to move.
    """

    __slots__ = ("_copy", "_tensor", "memory")

    def __init__(self, tensor: Tensor, reduces: bool = False) -> None:
        self._tensor = tensor = tensor.detach()
        wide = tensor.float() if reduces and tensor.dtype in _HALF else tensor
        self._copy = wide.contiguous().resolve_conj().resolve_neg()
        self.memory = _memory(self._copy) if reduces else _bytes(self._copy)

    def write_back(self) -> None:
        """Writes what MPI has put into a copy to the tensor."""
        if self._copy is not self._tensor:
            self._tensor.copy_(self._copy)


def _bytes(tensor: Tensor) -> Any:
    """Returns the bytes of a contiguous tensor for MPI."""
    return [_memory(tensor.reshape(-1).view(torch.uint8)), MPI.BYTE]


def _memory(tensor: Tensor) -> Any:
    """Returns a contiguous tensor as numpy array, or itself if it is on a GPU."""
    if not tensor.is_cuda:
        return tensor.numpy()
    if not mpi_is_cuda_aware():
        raise RuntimeError(
            "comm.backend=mpi was given a tensor on a GPU, and this MPI may not support CUDA: "
            f"use comm.backend=nccl or gloo, or set one of {', '.join(CUDA_AWARE)} if it does"
        )
    torch.cuda.current_stream().synchronize()  # MPI does not know streams
    return tensor
