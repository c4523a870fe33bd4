"""Collects all mistakes in the options that are visible without torch.

``validation`` has the bounds of numbers, and checks options that depend on each other.
"""

from collections.abc import Iterator, Sequence
from operator import attrgetter

from . import enums
from .errors import ConfigError, format_option_error
from .schema import Config
from .validation.bounds import BOUNDS, beyond, within
from .validation.data import data_mistakes
from .validation.optimizing import optimizing_mistakes
from .validation.resume import resume_mistakes
from .validation.synchronising import synchronising_mistakes
from .validation.task import task_mistakes
from .validation.tracking import tracking_mistakes
from .validation.training import is_import_path, training_mistakes

_ADAPTIVE = [enums.ServerOptimizerName.adam, enums.ServerOptimizerName.yogi]
_FEDOPT = [enums.ServerOptimizerName.momentum, *_ADAPTIVE]
# For each option that depends on a choice: the choices that use it.
_USERS: dict[str, dict[str, Sequence[enums.Choice]]] = {
    "algorithm.name": {
        "algorithm.synchronised_steps": [enums.AlgorithmName.fedtan],
        "algorithm.synchronise_every": [enums.AlgorithmName.fedtan],
        "algorithm.layers": [enums.AlgorithmName.fedtan],
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
    numbers = beyond(config, BOUNDS)
    if numbers:
        config = within(config, BOUNDS)  # the other checks compute with the numbers
    others = [
        *_unused(config),
        *_rounds(config),
        *data_mistakes(config),
        *training_mistakes(config),
        *synchronising_mistakes(config),
        *task_mistakes(config),
        *optimizing_mistakes(config),
        *resume_mistakes(config),
        *_job(config),
        *tracking_mistakes(config.tracking),
    ]
    others = [line for line in others if line.partition("=")[0] not in numbers]
    if numbers or others:
        raise ConfigError(*numbers.values(), *others)


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
