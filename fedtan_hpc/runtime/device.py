"""The device on which this rank computes, the backend of its collectives, and TensorFloat-32.

A job chooses its ``DevicePlacement`` here, before it starts the process group.
"""

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
from .launcher_env import CUDA_AWARE, MPI_LAUNCHERS, RankInfo


@dataclass(frozen=True)
class DevicePlacement:
    """A rank's device, the backend that carries its tensors, and its number of CPU threads."""

    device: torch.device
    backend: str
    threads: int = 1
    ranks_per_device: int = 1
    """Ranks that share the device's memory, this one included."""
    ranks_on_node: int = 1
    """Ranks that share the memory of the host."""


def choose(config: Config, info: RankInfo) -> DevicePlacement:
    """Follows ``device``, ``comm.backend`` and ``threads``; a GPU is that of the local rank.

    Raises ``ConfigError`` if the machine or the launcher lacks what the options ask for.
    """
    backend = config.comm.backend
    _check_mpi(backend, info)
    threads = launcher_env.threads(config.threads)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device is DeviceName.cuda and gpus == 0:
        allowed = "auto or cpu, because no GPU is visible"
        remedy = "set device=auto or start on a machine with a GPU"
        raise ConfigError(format_option_error("device", "cuda", allowed, remedy))
    if config.device is DeviceName.cpu or gpus == 0:
        cpu, sharing = torch.device("cpu"), info.local_world_size
        return DevicePlacement(cpu, _cpu_backend(backend, info), threads, sharing, sharing)
    device = torch.device("cuda", info.local_rank % gpus)
    sharing = _ranks_per_gpu(backend, info, gpus)
    carrier = _gpu_backend(backend, info, gpus, sharing)
    return DevicePlacement(device, carrier, threads, sharing, info.local_world_size)


def _cpu_backend(backend: BackendName, info: RankInfo) -> str:
    if backend is BackendName.nccl:
        allowed = "auto or gloo, because the ranks have no GPU"
        raise _backend_error("nccl", allowed, "set comm.backend=gloo or auto")
    # Small sums are many times faster over MPI than over gloo.
    return "mpi" if _has_mpi(backend, info) and backend is not BackendName.gloo else "gloo"


def _gpu_backend(backend: BackendName, info: RankInfo, gpus: int, ranks_per_gpu: int) -> str:
    if backend is BackendName.nccl and ranks_per_gpu > 1:
        allowed = f"auto or gloo, because {info.local_world_size} ranks share {gpus} GPUs"
        raise _backend_error("nccl", allowed, "set comm.backend=gloo or start one rank per GPU")
    if backend is BackendName.mpi and not launcher_env.mpi_is_cuda_aware():
        allowed = (
            "auto, gloo or nccl with device=cuda, because this MPI is not known to take GPU memory"
        )
        remedy = f"leave it out, or set one of {', '.join(CUDA_AWARE)} to 1 if it does"
        raise _backend_error("mpi", allowed, remedy)
    if backend is BackendName.auto:
        return "gloo" if ranks_per_gpu > 1 else "nccl"
    return backend.name


def _backend_error(backend: str, allowed: str, remedy: str) -> ConfigError:
    return ConfigError(format_option_error("comm.backend", backend, allowed, remedy))


def _has_mpi(backend: BackendName, info: RankInfo) -> bool:
    """Returns whether the ranks can use MPI: mpirun started them, or srun for comm.backend=mpi."""
    by_srun = info.launcher == "srun" and backend is BackendName.mpi
    return by_srun or info.launcher in MPI_LAUNCHERS


def _check_mpi(backend: BackendName, info: RankInfo) -> None:
    """Raises ``ConfigError`` if MPI is needed and the launcher or mpi4py is missing.

    Ranks that mpirun started need MPI with every backend: they find each other by MPI alone.
    """
    if not _has_mpi(backend, info):
        if backend is BackendName.mpi and info.world_size > 1:
            allowed = f"auto or gloo, or nccl with GPUs, because {info.launcher} started the ranks"
            raise _backend_error("mpi", allowed, "start with mpirun -n N python -m fedtan_hpc")
    elif find_spec("mpi4py") is None:
        allowed = "a start without MPI, because mpi4py is not installed"
        remedy = "pip install 'fedtan_hpc[mpi]', or start with torchrun"
        raise ConfigError(format_option_error("launcher", info.launcher, allowed, remedy))


def _ranks_per_gpu(backend: BackendName, info: RankInfo, gpus: int) -> int:
    """Returns how many ranks of this machine share each of the ``gpus`` that this rank sees.

    If a script has chosen one GPU for each rank, nothing shows that these GPUs differ.  NCCL, which
    refuses ranks that share a GPU, is then used only if the user asks for it.
    """
    is_chosen = gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    if is_chosen and backend is BackendName.nccl:
        return 1
    # torchrun starts several ranks inside one task of SLURM.
    if launcher_env.has_gpus_per_task() and info.launcher != "torchrun":
        return 1
    return -(-info.local_world_size // gpus)


@contextmanager
def tensor_float(allowed: bool) -> Iterator[None]:
    """Calls ``allow_tensor_float`` for the block, then restores the caller's choice."""
    restore = allow_tensor_float(allowed)
    try:
        yield
    finally:
        restore()


def allow_tensor_float(allowed: bool) -> Callable[[], object]:
    """Sets whether a GPU may round inputs of float32 products and convolutions to TensorFloat-32.

    By default torch allows it for convolutions.  Returns a function that restores the old choice.
    """
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the caller used torch's newer settings, which exclude the older ones
        return partial(_set_newer, _set_newer(["tf32" if allowed else "ieee"] * 3))
    _set_older("high" if allowed else "highest", allowed)
    return partial(_set_older, *before)


def _set_older(products: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


def _set_newer(precisions: Sequence[str]) -> list[str]:
    """Sets the precisions of products, convolutions and recurrent layers; returns the former."""
    backends: Any = torch.backends
    settings = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
    before = [setting.fp32_precision for setting in settings]
    for setting, precision in zip(settings, precisions, strict=True):
        setting.fp32_precision = precision
    return before
