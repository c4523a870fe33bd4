"""Where this rank computes, and who carries its collectives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .choices import BackendName, DeviceName
from .config import Config
from .environment import RankInfo
from .errors import ConfigError, mistake


@dataclass(frozen=True)
class Place:
    """A device, and the backend for tensors on it."""

    device: torch.device
    backend: str


def choose(config: Config, info: RankInfo) -> Place:
    """Follow ``device`` and ``comm.backend``; with CUDA, the GPU of the local rank.

    Raises ``ConfigError`` if the machine lacks what is asked for.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device is DeviceName.cuda and gpus == 0:
        remedy = "set device=auto or start on a machine with a GPU"
        raise ConfigError(mistake("device", "cuda", "auto or cpu, for no GPU is visible", remedy))
    if config.device is DeviceName.cpu or gpus == 0:
        if config.comm.backend is BackendName.nccl:
            remedy = "set comm.backend=gloo or auto"
            allowed = "auto or gloo, for the ranks have no GPU"
            raise ConfigError(mistake("comm.backend", "nccl", allowed, remedy))
        return Place(torch.device("cpu"), "gloo")
    shared = info.local_world_size > gpus
    if config.comm.backend is BackendName.nccl and shared:
        allowed = f"auto or gloo, for {info.local_world_size} ranks share {gpus} GPUs"
        remedy = "set comm.backend=gloo or start one rank per GPU"
        raise ConfigError(mistake("comm.backend", "nccl", allowed, remedy))
    device = torch.device("cuda", info.local_rank % gpus)
    gloo = shared or config.comm.backend is BackendName.gloo
    return Place(device, "gloo" if gloo else "nccl")
