"""Where this rank computes, and who carries its collectives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from ..config.enums import BackendName, DeviceName
from ..config.errors import ConfigError, format_option_error
from ..config.schema import Config
from . import launcher_env
from .launcher_env import (
    CUDA_AWARE,
    MPI_LAUNCHERS,
    RankInfo,
    gpus_are_of_a_task,
    mpi_takes_gpu_memory,
)


@dataclass(frozen=True)
class DevicePlacement:
    """A device, the backend for tensors on it, and how many CPU threads compute."""

    device: torch.device
    backend: str
    threads: int = 1
    ranks_per_device: int = 1
    """Ranks that share the device's memory, this one included."""


def choose(config: Config, info: RankInfo) -> DevicePlacement:
    """Follow ``device`` and ``comm.backend``; with CUDA, the GPU of the local rank.

    Raises ``ConfigError`` if the machine lacks what is asked for.
    """
    _check_launcher(config, info)
    threads = launcher_env.threads(config.threads)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device is DeviceName.cuda and gpus == 0:
        remedy = "set device=auto or start on a machine with a GPU"
        raise ConfigError(
            format_option_error("device", "cuda", "auto or cpu, for no GPU is visible", remedy)
        )
    if config.device is DeviceName.cpu or gpus == 0:
        if config.comm.backend is BackendName.nccl:
            remedy = "set comm.backend=gloo or auto"
            allowed = "auto or gloo, for the ranks have no GPU"
            raise ConfigError(format_option_error("comm.backend", "nccl", allowed, remedy))
        return DevicePlacement(
            torch.device("cpu"), _on_cpu(config, info), threads, info.local_world_size
        )
    ranks_per_device = _ranks_of_a_gpu(config, info, gpus)
    if config.comm.backend is BackendName.nccl and ranks_per_device > 1:
        allowed = f"auto or gloo, for {info.local_world_size} ranks share {gpus} GPUs"
        remedy = "set comm.backend=gloo or start one rank per GPU"
        raise ConfigError(format_option_error("comm.backend", "nccl", allowed, remedy))
    device = torch.device("cuda", info.local_rank % gpus)
    if config.comm.backend is BackendName.mpi:
        _check_cuda_aware()
        return DevicePlacement(device, "mpi", threads, ranks_per_device)
    gloo = ranks_per_device > 1 or config.comm.backend is BackendName.gloo
    return DevicePlacement(device, "gloo" if gloo else "nccl", threads, ranks_per_device)


def _ranks_of_a_gpu(config: Config, info: RankInfo, gpus: int) -> int:
    """How many ranks of this machine share each of the ``gpus`` that this one sees.

    Where a script has chosen one for each rank nothing shows that they are not the same one: there
    NCCL, which refuses to share, is taken only if asked for.
    """
    chosen = gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    if chosen and config.comm.backend is BackendName.nccl:
        return 1
    if gpus_are_of_a_task() and info.launcher != "torchrun":  # which starts ranks inside a task
        return 1
    return -(-info.local_world_size // gpus)


@contextmanager
def tensor_float(allowed: bool) -> Iterator[None]:
    """``allow_tensor_float`` for a while; then the caller's choice is put back."""
    put_back = allow_tensor_float(allowed)
    try:
        yield
    finally:
        put_back()


def allow_tensor_float(allowed: bool) -> Callable[[], None]:
    """Whether a GPU may round the inputs of float32 products and convolutions to TensorFloat-32.

    torch lets convolutions do so unless told otherwise.  Returns what puts the choice back that was
    there before.
    """
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the caller chose by torch's newer settings, which bar the older ones
        parts = _newer_settings()
        precisions = [part.fp32_precision for part in parts]
        _choose_newer(["tf32" if allowed else "ieee"] * len(parts))
        return partial(_choose_newer, precisions)
    _choose("high" if allowed else "highest", allowed)
    return partial(_choose, *before)


def _choose(products: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


def _newer_settings() -> Sequence[Any]:
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn


def _choose_newer(precisions: Sequence[str]) -> None:
    for part, precision in zip(_newer_settings(), precisions, strict=True):
        part.fp32_precision = precision


def _on_cpu(config: Config, info: RankInfo) -> str:
    """MPI where it is there anyway: small sums are many times faster over it than over gloo."""
    by_mpi = info.launcher in MPI_LAUNCHERS and config.comm.backend is not BackendName.gloo
    by_mpi = by_mpi or (info.launcher == "srun" and config.comm.backend is BackendName.mpi)
    return "mpi" if by_mpi else "gloo"


def _check_launcher(config: Config, info: RankInfo) -> None:
    """MPI works under its own launcher, and such ranks find each other by MPI alone."""
    by_mpirun = info.launcher in MPI_LAUNCHERS
    asked = config.comm.backend is BackendName.mpi
    by_srun = info.launcher == "srun" and asked
    if asked and not (by_mpirun or by_srun) and info.world_size > 1:
        allowed = f"auto or gloo, or nccl with GPUs, for {info.launcher} started the ranks"
        remedy = "start with mpirun -n N python -m fedtan_hpc"
        raise ConfigError(format_option_error("comm.backend", "mpi", allowed, remedy))
    if (by_mpirun or by_srun) and find_spec("mpi4py") is None:
        allowed = "a start without MPI, for mpi4py is not installed"
        remedy = "pip install 'fedtan_hpc[mpi]', or start with torchrun"
        raise ConfigError(format_option_error("launcher", info.launcher, allowed, remedy))


def _check_cuda_aware() -> None:
    if not mpi_takes_gpu_memory():
        allowed = (
            "auto, gloo or nccl with device=cuda, for this MPI is not known to take GPU memory"
        )
        remedy = f"leave it out, or set one of {', '.join(CUDA_AWARE)} to 1 if it does"
        raise ConfigError(format_option_error("comm.backend", "mpi", allowed, remedy))
