"""What a run leaves: the global model, what clients keep for themselves, and the summary."""

from __future__ import annotations

import os
import platform
import resource
import statistics
from pathlib import Path

import torch

from .. import __version__
from ..config.schema import Config
from ..distributed import collectives, process_group
from ..evaluation.records import RoundRecord, Summary
from ..models import factory
from ..runtime import atomic_files
from ..runtime.device import DevicePlacement
from ..runtime.launcher_env import RankInfo
from .phases import phases
from .trainer import Trainer


def save_models(trainer: Trainer, folder: Path) -> None:
    """Rank 0 writes the global model, and what the clients drawn so far have for themselves."""
    if process_group.rank() == 0:
        state = {key: value.cpu() for key, value in trainer.model.state_dict().items()}
        atomic_files.save(folder / "model.pt", state)
    states = trainer.cohort.states
    kept = {}
    for client in states.drawn() if states.exist else []:
        named = states.named(client, trainer.model)
        if process_group.rank() == 0:
            kept[client] = named
    if kept:
        atomic_files.save(folder / "clients.pt", kept)


def machine(device: torch.device) -> str:
    """What computes here: the GPU's name, or the CPUs' and how many they are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{os.cpu_count()} x {name}"


def _peak_memory(device: torch.device) -> torch.Tensor:
    """Most memory that this process has had, in bytes: of the GPU if it computes there; 0-d."""
    if device.type == "cuda":
        return torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    return torch.tensor(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def backend(place: DevicePlacement) -> str:
    """The carrier of the collectives, if there are any."""
    return place.backend if process_group.is_started() else "none"


def summarise(
    config: Config,
    info: RankInfo,
    place: DevicePlacement,
    records: list[RoundRecord],
    trainer: Trainer,
    seconds: tuple[float, float],
    folder: Path,
    resumed_after: list[int],
    behind: int,
) -> Summary:
    """The result after ``records``, of which so many are of rounds ``behind`` this process.

    ``seconds`` are those of start-up, and in all.  Every rank calls it.
    """
    last = records[-1]
    assert last.test_accuracy is not None
    assert last.test_loss is not None
    own = last.clients_test_accuracy_mean
    return Summary(
        algorithm=str(config.algorithm.name),
        rounds=config.rounds,
        test_accuracy=last.test_accuracy,
        judged="global model" if own is None else "mean over the clients' own models",
        test_loss=last.test_loss,
        pooled_train_loss=last.pooled_train_loss,
        clients_judged=last.clients_judged,
        clients_test_accuracy_mean=own,
        clients_test_accuracy_spread=last.clients_test_accuracy_spread,
        clients_own_mix_accuracy_mean=last.clients_own_mix_accuracy_mean,
        clients_own_mix_accuracy_spread=last.clients_own_mix_accuracy_spread,
        total_seconds=seconds[1],
        startup_seconds=seconds[0],
        peak_memory_bytes=max(
            int(peak) for peak in collectives.all_gather(_peak_memory(place.device))
        ),
        median_round_seconds=statistics.median(record.round_seconds for record in records),
        world_size=info.world_size,
        backend=backend(place),
        device=str(place.device),
        parameters=factory.parameter_count(trainer.model),
        versions={
            "fedtan_hpc": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        run_dir=str(folder),
        machine=machine(place.device),
        compile_seconds=trainer.cohort.training.loss.compile_seconds,
        phases=phases(records[behind:], place.device),
        resumed_after=resumed_after,
    )
