"""Tensors as MPI takes them: views of their memory where it is in one piece, else copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...runtime.launcher_env import CUDA_AWARE, mpi_takes_gpu_memory
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
_ON_TRUTH = {
    **_OPERATIONS,
    dist.ReduceOp.SUM: MPI.LOR,
    dist.ReduceOp.MAX: MPI.LOR,
    dist.ReduceOp.PRODUCT: MPI.LAND,
    dist.ReduceOp.MIN: MPI.LAND,
}
_HALF = (torch.bfloat16, torch.float16)


def operation_of(operation: Any, tensor: Tensor) -> MPI.Op:
    """MPI's name of torch's reduction; on truth values sums and products are or and and.

    Raises ``ValueError`` for one that MPI does not have.
    """
    table = _ON_TRUTH if tensor.dtype is torch.bool else _OPERATIONS
    found = next((op for known, op in table.items() if operation == known), None)
    if found is None:
        raise ValueError(f"{operation} is not to be had over MPI; multiply before summing")
    return found


@contextmanager
def values_of(tensor: Tensor, writes: bool = True) -> Iterator[Any]:
    """A numpy view of ``tensor``, or a copy that is written back; never part of autograd."""
    tensor = tensor.detach()
    if tensor.is_cuda:
        _check_cuda()
        yield tensor
        return
    if tensor.is_contiguous() and tensor.dtype not in _HALF:
        yield _array(tensor)
        return
    wide = tensor.float() if tensor.dtype in _HALF else tensor.contiguous()
    yield _array(wide)
    if writes:
        tensor.copy_(wide)


def _array(tensor: Tensor) -> Any:
    return tensor.resolve_conj().resolve_neg().numpy()


@contextmanager
def bytes_of(tensor: Tensor, writes: bool = True) -> Iterator[Any]:
    """The bytes of ``tensor``, where only they count and not the type; or of a copy."""
    tensor = tensor.detach()
    contiguous = tensor.contiguous()
    yield raw(contiguous)
    if writes and contiguous is not tensor:
        tensor.copy_(contiguous)


def raw(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor as bytes."""
    if tensor.is_cuda:
        _check_cuda()
    memory = tensor.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
    return [memory if memory.is_cuda else memory.numpy(), MPI.BYTE]


def _check_cuda() -> None:
    if not mpi_takes_gpu_memory():
        raise RuntimeError(
            "comm.backend=mpi was given a tensor on a GPU, and this MPI is not known to take such: "
            f"use comm.backend=nccl or gloo, or set one of {', '.join(CUDA_AWARE)} if it does"
        )
    torch.cuda.current_stream().synchronize()  # MPI knows nothing of streams
