"""What a run leaves at its end: the global model, the clients' private states and the summary."""

import os
import platform
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..distributed import collectives, process_group
from ..evaluation.early_stopping import BestEvaluation
from ..evaluation.records import RoundRecord, Summary
from ..files import atomic_files
from ..models import factory
from .context import RunContext
from .resume import Resumption
from .trainer import Trainer

PHASES = ("compute", "statistics", "average", "waiting", "evaluation")


def save_models(trainer: Trainer, run_dir: Path) -> None:
    """Writes ``model.pt``, and private states to ``clients.pt``; every rank calls it."""
    if process_group.rank() == 0:
        state = {key: value.cpu() for key, value in trainer.model.state_dict().items()}
        atomic_files.save(run_dir / "model.pt", state)
    states = trainer.cohort.states
    private = {}
    for client in states.drawn() if states.exist else []:
        named = states.named(client, trainer.model)
        if process_group.rank() == 0:
            private[client] = named
    if private:
        atomic_files.save(run_dir / "clients.pt", private)


def summarise(
    run: RunContext,
    trainer: Trainer,
    records: Sequence[RoundRecord],
    resumption: Resumption,
    startup_seconds: float,
) -> Summary:
    """Returns the summary of all ``records``; every rank calls it."""
    last, device = records[-1], run.placement.device
    has_global_model = not trainer.cohort.states.are_models
    best = BestEvaluation(run.config.early_stopping, records)
    shared = [field.name for field in fields(Summary) if hasattr(last, field.name)]
    figures: dict[str, Any] = {name: getattr(last, name) for name in shared}
    return Summary(
        algorithm=str(run.config.algorithm.name),
        rounds=len(records),
        judged="global model" if has_global_model else "mean over the clients' own models",
        total_seconds=time.perf_counter() - run.started + resumption.seconds,
        startup_seconds=startup_seconds,
        peak_memory_bytes=max(int(peak) for peak in collectives.all_gather(_peak_memory(device))),
        median_round_seconds=statistics.median(record.round_seconds for record in records),
        world_size=run.rank_info.world_size,
        backend=run.backend,
        device=str(device),
        parameters=factory.parameter_count(trainer.model),
        versions={
            "fedtan_hpc": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        run_dir=str(run.run_dir),
        machine=machine(device),
        data=trainer.store.description(),
        compile_seconds=trainer.cohort.loss.compile_seconds,
        phases=phases(records[len(resumption.history) :], device),
        resumed_after=resumption.resumed_after,
        stopped_early=best.reason_to_stop() if len(records) < run.config.rounds else "",
        best_round=best.round,
        best_value=best.value,
        **figures,  # of the last evaluation
    )


def machine(device: torch.device) -> str:
    """Returns the name of the GPU, or the number and name of the CPUs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{os.cpu_count()} x {name}"


def _peak_memory(device: torch.device) -> Tensor:
    """Returns this process's largest memory use in bytes, on the GPU if it uses one; 0-d."""
    if device.type == "cuda":
        return torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    return torch.tensor(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def phases(records: Sequence[RoundRecord], device: torch.device) -> dict[str, float]:
    """Returns seconds of a round by phase: means over the ranks, medians over ``records``.

    Every rank calls it with its own records of the same rounds.  A rank that comes late to a
    collective does not wait in it.  So the least time that any rank spends in a round's collectives
    is the time of the transfer, and what other ranks spend beyond it is waiting.
    """
    rows = [
        (each.round_seconds, each.statistics_seconds, each.average_seconds, each.evaluation_seconds)
        for each in records
    ]
    times_R4 = torch.tensor(rows, dtype=torch.float64, device=device).view(-1, 4)
    times_PR4 = collectives.to_cpu(torch.stack(collectives.all_gather(times_R4)))
    medians = _by_phase(times_PR4).median(0).values if rows else torch.zeros(len(PHASES))
    return dict(zip(PHASES, medians.tolist(), strict=True))


def _by_phase(times_PR4: Tensor) -> Tensor:
    total, statistics, average, evaluation = times_PR4.unbind(-1)
    compute = total - statistics - average
    transfer = (statistics + average).amin(0)
    waiting = (statistics + average - transfer).mean(0)
    share = torch.where(transfer > 0, statistics.mean(0) / (statistics + average).mean(0), 0.0)
    columns = [compute.mean(0), transfer * share, transfer * (1 - share), waiting]
    return torch.stack([*columns, evaluation.mean(0)], dim=-1)
