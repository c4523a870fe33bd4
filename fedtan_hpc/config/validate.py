"""Collects all mistakes in the options that are visible without torch.

Tables hold the rules for single options; ``validation`` checks options that depend on each other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from operator import attrgetter
from typing import Any, NamedTuple

from . import enums
from .errors import ConfigError, format_option_error
from .schema import Config
from .validation.data import data_mistakes
from .validation.optimizing import optimizing_mistakes
from .validation.resume import resume_mistakes
from .validation.task import task_mistakes
from .validation.tracking import tracking_mistakes
from .validation.training import is_import_path, training_mistakes


class Range(NamedTuple):
    """The valid values of an option, and their description."""

    contains: Callable[[Any], bool]
    description: str


_POSITIVE = Range(lambda value: 0 < value < inf, "a finite number > 0")
_NON_NEGATIVE = Range(lambda value: 0 <= value < inf, "a finite number >= 0")
_DECAY = Range(lambda value: 0 <= value < 1, "a number >= 0 and below 1")
_YEAR = Range(lambda value: 0 < value <= 365 * 86400, "seconds > 0, 31536000 (a year) at most")

_MINIMA = {
    "clients": 1,
    "clients_per_round": 1,
    "rounds": 1,
    "local_steps": 1,
    "local_epochs": 1,
    "early_stopping.patience": 1,
    "batch_size": 1,
    "eval_every": 1,
    "eval_train_samples": 0,
    "eval_clients": 1,
    "check_every": 1,
    "threads": 1,
    "algorithm.synchronise_every": 1,
    "algorithm.groups": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "cohort.max_stacked": 1,
}

# Valid values, and an example for the remedy.
_RANGES = {
    "seed": (Range(lambda value: 0 <= value < 2**32, "a whole number >= 0 and below 2^32"), 0),
    "optimizer.lr": (_POSITIVE, 0.1),
    "optimizer.momentum": (_DECAY, 0.9),
    "optimizer.weight_decay": (_NON_NEGATIVE, 1e-4),
    "optimizer.eps": (_POSITIVE, 1e-8),
    "optimizer.clip_norm": (_POSITIVE, 1.0),
    "lr_schedule.power": (_POSITIVE, 1.0),
    "lr_schedule.final": (Range(lambda value: 0 <= value <= 1, "a number >= 0, 1 at most"), 0.01),
    "lr_schedule.gamma": (Range(lambda value: 0 < value <= 10, "a number > 0, 10 at most"), 0.1),
    "client.proximal_mu": (_NON_NEGATIVE, 0.01),
    "server.lr": (_POSITIVE, 0.01),
    "server.momentum": (_DECAY, 0.9),
    "server.beta2": (_DECAY, 0.99),
    "server.tau": (_POSITIVE, 1e-3),
    "partition.alpha": (Range(lambda value: 0 < value <= 1e6, "a number > 0, 1e6 at most"), 0.5),
    "comm.timeout_seconds": (_YEAR, 300),
}

_ADAPTIVE = [enums.ServerOptimizerName.adam, enums.ServerOptimizerName.yogi]
_FEDOPT = [enums.ServerOptimizerName.momentum, *_ADAPTIVE]
# For each option that depends on a choice: the choices that use it.
_USERS: dict[str, dict[str, Sequence[enums.Choice]]] = {
    "algorithm.name": {
        "algorithm.synchronised_steps": [enums.AlgorithmName.fedtan],
        "algorithm.synchronise_every": [enums.AlgorithmName.fedtan],
        "algorithm.switch_round": [enums.AlgorithmName.fixbn],
    },
    "data.name": {
        "data.samples": [enums.DataName.synthetic],
        "data.shape": [enums.DataName.synthetic],
        "data.classes": [enums.DataName.synthetic],
    },
    "lr_schedule.name": {
        "lr_schedule.power": [enums.LrScheduleName.polynomial],
        "lr_schedule.final": [enums.LrScheduleName.cosine, enums.LrScheduleName.polynomial],
    },
    "partition.name": {
        "partition.classes_per_client": [enums.PartitionName.shards],
        "partition.alpha": [enums.PartitionName.dirichlet, enums.PartitionName.quantity],
        "partition.shift": [enums.PartitionName.feature_shift],
        "partition.strength": [enums.PartitionName.feature_shift],
    },
    "server.optimizer": {
        "server.lr": _FEDOPT,
        "server.momentum": _FEDOPT,
        "server.beta2": _ADAPTIVE,
        "server.tau": _ADAPTIVE,
    },
}


def check(config: Config) -> None:
    """Raises ``ConfigError`` with one line for each mistake in ``config``."""
    mistakes = [
        *below_minimum(config, _MINIMA),
        *_out_of_range(config),
        *_unused(config),
        *_rounds(config),
        *data_mistakes(config),
        *training_mistakes(config),
        *task_mistakes(config),
        *optimizing_mistakes(config),
        *resume_mistakes(config),
        *_job(config),
        *tracking_mistakes(config.tracking),
    ]
    if mistakes:
        raise ConfigError(*mistakes)


def below_minimum(options: object, minima: Mapping[str, int], prefix: str = "") -> Iterator[str]:
    """Yields a line for each option below its minimum; null is allowed."""
    for name, least in minima.items():
        value = attrgetter(name)(options)
        if value is not None and value < least:
            option, allowed = prefix + name, f"a whole number >= {least}"
            yield format_option_error(option, value, allowed, f"set {option}={least}")


def _out_of_range(config: Config) -> Iterator[str]:
    for option, (valid, example) in _RANGES.items():
        value = attrgetter(option)(config)
        if value is not None and not valid.contains(value):
            yield format_option_error(option, value, valid.description, f"try {option}={example}")


def _unused(config: Config) -> Iterator[str]:
    """Options that are set although the current choice does not use them."""
    for choice, users in _USERS.items():
        chosen, name = attrgetter(choice)(config), choice.removesuffix(".name")
        for option, names in users.items():
            value = attrgetter(option)(config)
            if value is not None and chosen not in names:
                remedy = f"leave it out or use {' or '.join(f'{name}={each}' for each in names)}"
                yield format_option_error(option, value, f"null with {name}={chosen}", remedy)


def _rounds(config: Config) -> Iterator[str]:
    """Participation in rounds."""
    per_round = config.clients_per_round
    if per_round is None and config.participation is enums.ParticipationName.weighted:
        allowed = "uniform while all clients take part"
        remedy = "set clients_per_round, or leave participation out"
        yield format_option_error("participation", "weighted", allowed, remedy)
    is_natural = config.partition.name is enums.PartitionName.natural  # the data have the number
    if (per_round or 1) > max(config.clients, 1) and not is_natural:
        allowed = f"1 to clients, {config.clients}"
        remedy = f"set clients_per_round={config.clients} or leave it out"
        yield format_option_error("clients_per_round", per_round, allowed, remedy)


def _job(config: Config) -> Iterator[str]:
    """Device, backend, files and callbacks."""
    if config.tf32 and (config.device is enums.DeviceName.cpu or config.precision != "float32"):
        allowed = "false, unless device is auto or cuda and precision is float32"
        yield format_option_error("tf32", "true", allowed, "leave it out")
    if config.run_dir is not None and not config.run_dir.strip():
        allowed, remedy = "the name of a folder, or null", "name a folder or leave it out"
        yield format_option_error("run_dir", config.run_dir, allowed, remedy)
    for callback in config.callbacks:
        if not is_import_path(callback):
            remedy = "for example callbacks=[my_callbacks:Plot]"
            yield format_option_error("callbacks", callback, "package.module:callable", remedy)
    if config.comm.backend is enums.BackendName.nccl and config.device is enums.DeviceName.cpu:
        remedy = "set comm.backend=gloo or device=cuda"
        yield format_option_error("comm.backend", "nccl", "auto or gloo with device=cpu", remedy)
