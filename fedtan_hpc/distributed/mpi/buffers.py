"""Tensors as buffers of MPI: views where the tensor is contiguous, else copies.

``mpi.process_group`` passes every tensor through these functions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
    **_OPERATIONS,
    dist.ReduceOp.SUM: MPI.LOR,
    dist.ReduceOp.MAX: MPI.LOR,
    dist.ReduceOp.PRODUCT: MPI.LAND,
    dist.ReduceOp.MIN: MPI.LAND,
}
_HALF = (torch.bfloat16, torch.float16)


def mpi_operation(operation: Any, tensor: Tensor) -> MPI.Op:
    """Returns MPI's name of torch's reduction; sums and products of bool are or and and.

    Raises ``ValueError`` for a reduction that MPI does not have.
    """
    table = _BOOL_OPERATIONS if tensor.dtype is torch.bool else _OPERATIONS
    for known, mpi_name in table.items():
        if operation == known:
            return mpi_name
    raise ValueError(f"MPI has no {operation}; multiply before summing")


@contextmanager
def mpi_buffer(tensor: Tensor, writes: bool = True, reduces: bool = False) -> Iterator[Any]:
    """Yields ``tensor`` as MPI takes it: its memory if contiguous, else a copy of it.

    With ``writes``, MPI's result in a copy is copied back.  With ``reduces``, MPI sees values that
    it can add up, in float32 for half precision; otherwise it sees bytes to move.
    """
    tensor = tensor.detach()
    wide = tensor.float() if reduces and tensor.dtype in _HALF else tensor
    contiguous = wide.contiguous().resolve_conj().resolve_neg()
    yield _memory(contiguous) if reduces else raw_buffer(contiguous)
    if writes and contiguous is not tensor:
        tensor.copy_(contiguous)


def raw_buffer(tensor: Tensor) -> Any:
    """Returns the bytes of a contiguous tensor for MPI."""
    memory = tensor.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
    return [_memory(memory), MPI.BYTE]


def _memory(tensor: Tensor) -> Any:
    """Returns a contiguous tensor as numpy array, or itself if it is on a GPU."""
    if not tensor.is_cuda:
        return tensor.numpy()
    if not mpi_is_cuda_aware():
        raise RuntimeError(
            "comm.backend=mpi was given a tensor on a GPU, and this MPI is not known to take such: "
            f"use comm.backend=nccl or gloo, or set one of {', '.join(CUDA_AWARE)} if it does"
        )
    torch.cuda.current_stream().synchronize()  # MPI does not know streams
    return tensor
