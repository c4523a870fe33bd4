"""What a rank knows when its run starts: options, rank, device and folder; its process group."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..config.errors import ConfigError, format_option_error
from ..config.schema import Config
from ..distributed import collectives, process_group
from ..distributed.watchdog import Process, Watchdog
from ..runtime import device, launcher_env
from ..runtime.device import DevicePlacement
from ..runtime.launcher_env import RankInfo
from . import run_dir


@dataclass(frozen=True)
class RunContext:
    """One run on this rank; made by ``of`` before the ranks meet."""

    config: Config
    rank_info: RankInfo
    placement: DevicePlacement
    run_dir: Path
    started: float
    """When ``run`` was called, by ``time.perf_counter``."""

    @classmethod
    def of(cls, config: Config, started: float) -> "RunContext":
        """Finds out rank and device; raises ``ConfigError`` if the machine lacks what is asked for.

        So it does if the ranks cannot be divided into those of clients.

        The ranks are those of a process group that the caller has started, else the launcher's.
        """
        if process_group.is_started():
            rank, world_size = process_group.rank(), process_group.world_size()
            rank_info = launcher_env.info_of_existing_group(rank, world_size)
        else:
            rank_info = launcher_env.detect()
        if rank_info.world_size % (size := config.ranks_per_client):
            allowed = f"a divisor of the number of ranks, {rank_info.world_size}"
            remedy = f"start {size} ranks, or 2, 3, ... times as many"
            raise ConfigError(format_option_error("ranks_per_client", size, allowed, remedy))
        placement = device.choose(config, rank_info)
        return cls(config, rank_info, placement, run_dir.name(config), started)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and output."""
        return self.rank_info.rank == 0

    @property
    def backend(self) -> str:
        """The backend of the collectives; "none" without a process group."""
        return self.placement.backend if process_group.is_started() else "none"

    @contextmanager
    def process_group(self) -> Iterator[None]:
        """Joins the other ranks, with a watchdog, and leaves them at the end.

        Does nothing in a single process, or if the caller has started the process group.  After a
        failure this rank does not wait for ranks that may never come.
        """
        info, seconds = self.rank_info, self.config.comm.timeout_seconds
        if self.placement.device.type == "cuda":
            torch.cuda.set_device(self.placement.device)
        if info.launcher == "none" or process_group.is_started():
            process_group.begin_job()
            yield
            return
        channel = process_group.start(info.rank, info.world_size, self.placement.backend, seconds)
        watchdog = Watchdog(channel, seconds, partial(run_dir.note_failure, self.run_dir))
        watchdog.begin()
        try:
            known = collectives.all_gather_object((secrets.token_hex(), Process.of(os.getpid())))
            watchdog.processes = [process for _, process in known]
            channel.secret = known[0][0]
            yield
            process_group.stop()
        finally:
            watchdog.end()
