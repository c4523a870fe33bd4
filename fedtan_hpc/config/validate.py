"""Every mistake that can be found before torch is loaded, all of them at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .enums import BackendName, DeviceName, ParticipationName
from .errors import ConfigError, format_option_error
from .schema import Config, LrScheduleConfig
from .validate_data import data_mistakes
from .validate_methods import method_mistakes
from .validate_model import model_mistakes

_LONGEST_TIMEOUT = 365 * 86400.0


def check(config: Config) -> None:
    """Raise ``ConfigError`` with one line for each mistake in ``config``."""
    mistakes = [
        *_counts(config),
        *_numbers(config),
        *_schedule(config.lr_schedule),
        *data_mistakes(config),
        *model_mistakes(config),
        *method_mistakes(config),
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
        "eval_train_samples": (config.eval_train_samples, 0),
        "checkpoint.keep": (config.checkpoint.keep, 1),
        "cohort.max_stacked": (config.cohort.max_stacked, 1),
    }
    if config.threads is not None:
        bounds["threads"] = (config.threads, 1)
    if config.checkpoint.every is not None:
        bounds["checkpoint.every"] = (config.checkpoint.every, 1)
    if config.clients_per_round is not None:
        bounds["clients_per_round"] = (config.clients_per_round, 1)
    if config.eval_clients is not None:
        bounds["eval_clients"] = (config.eval_clients, 1)
    if config.check_every is not None:
        bounds["check_every"] = (config.check_every, 1)
    if config.seed >= 2**32:
        yield format_option_error("seed", config.seed, "a whole number below 2^32", "set seed=0")
    for option, (value, least) in bounds.items():
        if value < least:
            yield format_option_error(
                option, value, f"a whole number >= {least}", f"set {option}={least}"
            )
    if config.clients_per_round is None and config.participation is ParticipationName.weighted:
        remedy = "set clients_per_round, or leave participation out"
        yield format_option_error(
            "participation", "weighted", "uniform while all clients take part", remedy
        )
    if (config.clients_per_round or 1) > max(config.clients, 1):
        allowed = f"1 to clients, {config.clients}"
        remedy = f"set clients_per_round={config.clients} or leave it out"
        yield format_option_error("clients_per_round", config.clients_per_round, allowed, remedy)


def _numbers(config: Config) -> Iterator[str]:
    """Real numbers: finite, and above or at 0."""
    sgd = config.optimizer
    if not (math.isfinite(sgd.lr) and sgd.lr > 0):
        yield format_option_error(
            "optimizer.lr", sgd.lr, "a finite number > 0", "try optimizer.lr=0.1"
        )
    if not 0 <= sgd.momentum < 1:
        remedy = "try optimizer.momentum=0.9"
        yield format_option_error("optimizer.momentum", sgd.momentum, "0 <= momentum < 1", remedy)
    if not (math.isfinite(sgd.weight_decay) and sgd.weight_decay >= 0):
        remedy = "try optimizer.weight_decay=1e-4"
        yield format_option_error(
            "optimizer.weight_decay", sgd.weight_decay, "a finite number >= 0", remedy
        )
    seconds = config.comm.timeout_seconds
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        remedy = "try comm.timeout_seconds=300"
        allowed = f"seconds > 0, {_LONGEST_TIMEOUT:.0f} at most"
        yield format_option_error("comm.timeout_seconds", seconds, allowed, remedy)


def _schedule(schedule: LrScheduleConfig) -> Iterator[str]:
    milestones = schedule.milestones
    if milestones != sorted(set(milestones)) or any(m < 1 for m in milestones):
        yield format_option_error(
            "lr_schedule.milestones",
            milestones,
            "a list of rounds >= 1 in ascending order",
            "for example lr_schedule.milestones=[60,80]",
        )
    if not 0 < schedule.gamma <= 10:
        remedy = "try lr_schedule.gamma=0.1"
        yield format_option_error(
            "lr_schedule.gamma", schedule.gamma, "a number > 0, 10 at most", remedy
        )


def _places(config: Config) -> Iterator[str]:
    if config.tf32 and (config.device is DeviceName.cpu or config.precision != "float32"):
        allowed = "false, unless device is auto or cuda and precision is float32"
        yield format_option_error("tf32", "true", allowed, "leave it out")
    if config.run_dir is not None and not config.run_dir.strip():
        remedy = "name a folder or leave it out"
        yield format_option_error(
            "run_dir", config.run_dir, "the name of a folder, or null", remedy
        )
    if not config.resume.strip():
        remedy = "name a file or leave it out"
        yield format_option_error(
            "resume", config.resume, "auto, never or a checkpoint's file", remedy
        )
    if config.comm.backend is BackendName.nccl and config.device is DeviceName.cpu:
        allowed = "auto or gloo with device=cpu"
        yield format_option_error(
            "comm.backend", "nccl", allowed, "set comm.backend=gloo or device=cuda"
        )
