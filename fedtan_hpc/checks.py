"""Every mistake that can be found before torch is loaded, all of them at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .config import (
    BackendName,
    Config,
    DataName,
    DeviceName,
    LrScheduleConfig,
    ModelName,
    ParticipationName,
    PartitionName,
)
from .errors import ConfigError, mistake
from .limits import MINIMUM_SAMPLES, TEST_SHARE

_LONGEST_TIMEOUT = 365 * 86400.0
_LARGEST_SAMPLE = 10**8


def check(config: Config) -> None:
    """Raise ``ConfigError`` with one line for each mistake in ``config``."""
    mistakes = [
        *_counts(config),
        *_numbers(config),
        *_schedule(config.lr_schedule),
        *_data(config),
        *_partition(config),
        *_places(config),
    ]
    if mistakes:
        raise ConfigError(*mistakes)


def _counts(config: Config) -> Iterator[str]:
    """Whole numbers with a lower bound."""
    bounds = {
        "clients": (config.clients, 1),
        "rounds": (config.rounds, 1),
        "local_steps": (config.local_steps, 1),
        "batch_size": (config.batch_size, 2),
        "seed": (config.seed, 0),
        "eval_every": (config.eval_every, 1),
        "threads": (config.threads, 1),
        "cohort.max_stacked": (config.cohort.max_stacked, 1),
    }
    if config.clients_per_round is not None:
        bounds["clients_per_round"] = (config.clients_per_round, 1)
    if config.check_every is not None:
        bounds["check_every"] = (config.check_every, 1)
    if config.seed >= 2**32:
        yield mistake("seed", config.seed, "a whole number below 2^32", "set seed=0")
    for option, (value, least) in bounds.items():
        if value < least:
            yield mistake(option, value, f"a whole number >= {least}", f"set {option}={least}")
    if config.clients_per_round is None and config.participation is ParticipationName.weighted:
        remedy = "set clients_per_round, or leave participation out"
        yield mistake("participation", "weighted", "uniform while all clients take part", remedy)
    if (config.clients_per_round or 1) > max(config.clients, 1):
        allowed = f"1 to clients, {config.clients}"
        remedy = f"set clients_per_round={config.clients} or leave it out"
        yield mistake("clients_per_round", config.clients_per_round, allowed, remedy)


def _numbers(config: Config) -> Iterator[str]:
    """Real numbers: finite, and above or at 0."""
    sgd = config.optimizer
    if not (math.isfinite(sgd.lr) and sgd.lr > 0):
        yield mistake("optimizer.lr", sgd.lr, "a finite number > 0", "try optimizer.lr=0.1")
    if not 0 <= sgd.momentum < 1:
        remedy = "try optimizer.momentum=0.9"
        yield mistake("optimizer.momentum", sgd.momentum, "0 <= momentum < 1", remedy)
    if not (math.isfinite(sgd.weight_decay) and sgd.weight_decay >= 0):
        remedy = "try optimizer.weight_decay=1e-4"
        yield mistake("optimizer.weight_decay", sgd.weight_decay, "a finite number >= 0", remedy)
    seconds = config.comm.timeout_seconds
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        remedy = "try comm.timeout_seconds=300"
        allowed = f"seconds > 0, {_LONGEST_TIMEOUT:.0f} at most"
        yield mistake("comm.timeout_seconds", seconds, allowed, remedy)


def _schedule(schedule: LrScheduleConfig) -> Iterator[str]:
    milestones = schedule.milestones
    if milestones != sorted(set(milestones)) or any(m < 1 for m in milestones):
        yield mistake(
            "lr_schedule.milestones",
            milestones,
            "a list of rounds >= 1 in ascending order",
            "for example lr_schedule.milestones=[60,80]",
        )
    if not 0 < schedule.gamma <= 10:
        remedy = "try lr_schedule.gamma=0.1"
        yield mistake("lr_schedule.gamma", schedule.gamma, "a number > 0, 10 at most", remedy)


def _data(config: Config) -> Iterator[str]:
    data = config.data
    given = {"samples": data.samples, "shape": data.shape, "classes": data.classes}
    if data.name is not DataName.synthetic:
        for option, value in given.items():
            if value is not None:
                allowed = f"null with data={data.name}, which has its own"
                yield mistake(
                    f"data.{option}", value, allowed, "leave it out or use data=synthetic"
                )
        return
    samples, shape, classes = data.facts()
    if len(shape) != 3 or any(size < 1 for size in shape):
        remedy = "for example data.shape=[3,32,32]"
        allowed = "three sizes >= 1, [channels, height, width]"
        yield mistake("data.shape", list(shape), allowed, remedy)
    elif math.prod(shape) > _LARGEST_SAMPLE:
        allowed = f"{_LARGEST_SAMPLE} values in all at most"
        yield mistake("data.shape", list(shape), allowed, "use smaller samples")
    if classes < 2:
        yield mistake("data.classes", classes, "a whole number >= 2", "set data.classes=10")
    elif samples < 10 * classes:
        allowed = f"10 for each of the {classes} classes, {10 * classes}, or more"
        yield mistake("data.samples", samples, allowed, f"set data.samples={10 * classes}")
    if config.model.name is not ModelName.mlp and len(shape) == 3 and min(shape[1:]) < 4:
        allowed = f"4 pixels or more each way with model={config.model.name}"
        yield mistake("data.shape", list(shape), allowed, "use larger samples or model=mlp")


def _partition(config: Config) -> Iterator[str]:
    part = config.partition
    owners = {
        "classes_per_client": (part.classes_per_client, PartitionName.shards),
        "alpha": (part.alpha, PartitionName.dirichlet),
    }
    for option, (value, owner) in owners.items():
        if value is not None and part.name is not owner:
            allowed = f"null with partition={part.name}"
            remedy = f"leave it out or use partition={owner}"
            yield mistake(f"partition.{option}", value, allowed, remedy)
    alpha = part.alpha if part.name is PartitionName.dirichlet else None
    if alpha is not None and not 0 < alpha <= 1e6:
        remedy = "try partition.alpha=0.5"
        yield mistake("partition.alpha", alpha, "a number > 0, 1e6 at most", remedy)
    if part.name is PartitionName.shards and part.classes_per_client is not None:
        yield from _shards(config.clients, part.classes_per_client, config.data.facts()[2])
    yield from _enough_samples(config)


def _shards(clients: int, held: int, classes: int) -> Iterator[str]:
    option = "partition.classes_per_client"
    if not 1 <= held <= classes:
        yield mistake(option, held, f"1 to the number of classes, {classes}", f"set {option}=2")
    elif clients >= 1 and clients * held < classes:
        least = -(-classes // clients)
        allowed = f"{least} or more, for {clients} clients to hold all {classes} classes"
        yield mistake(option, held, allowed, f"set {option}={least} or use more clients")


def _enough_samples(config: Config) -> Iterator[str]:
    samples = int(config.data.facts()[0] * (1 - TEST_SHARE))
    most = samples // MINIMUM_SAMPLES
    if config.clients > most >= 1:
        allowed = f"{most} at most, for {MINIMUM_SAMPLES} of {samples} training samples each"
        yield mistake("clients", config.clients, allowed, "use fewer clients or more data")


def _places(config: Config) -> Iterator[str]:
    if config.run_dir is not None and not config.run_dir.strip():
        remedy = "name a folder or leave it out"
        yield mistake("run_dir", config.run_dir, "the name of a folder, or null", remedy)
    if config.comm.backend is BackendName.nccl and config.device is DeviceName.cpu:
        allowed = "auto or gloo with device=cpu"
        yield mistake("comm.backend", "nccl", allowed, "set comm.backend=gloo or device=cuda")
