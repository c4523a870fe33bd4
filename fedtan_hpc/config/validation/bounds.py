"""A lower and an upper bound for every option that is a number, in one table.

A test walks the schema and fails if an option has no row here.  Options that depend on each other
are checked elsewhere, with numbers that are within their bounds.  Used by ``validate`` and by
``submit_options``.
"""

import copy
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from ..errors import format_option_error

MOST = 10**9
"""Most clients, samples, rounds, steps and other things that are counted."""
LARGEST_FLOAT, SMALLEST_FLOAT = 1e38, 1e-38
"""Beyond these a number is infinite or 0 in float32."""
_YEAR_SECONDS = 365 * 86400
_LEAST_TIMEOUT_SECONDS = 5
"""In less time the watchdog cannot tell all ranks which of them hangs."""

Options = TypeVar("Options")


class Bound(NamedTuple):
    """The valid values of an option, or of each value in a list; ``example`` is for the remedy."""

    least: float
    most: float
    example: object
    is_below: bool = False
    """Whether ``most`` itself is not valid."""

    def contains(self, value: float) -> bool:
        """Returns whether a number is valid; NaN is not."""
        return self.least <= value <= self.most and not (self.is_below and value == self.most)

    def nearest(self, value: float) -> float:
        """Returns ``value``, or the least or most valid one."""
        if value < self.least or value != value:
            return self.least
        return value if self.contains(value) else self.least if self.is_below else self.most

    def __str__(self) -> str:
        kind = "a whole number" if isinstance(self.least, int) else "a number"
        most = f"and below {self.most:g}" if self.is_below else f"{_text(self.most)} at most"
        comma = "" if self.is_below else ","
        return f"{kind} >= {_text(self.least)}{comma} {most}"


def _text(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _count(least: int = 1, most: int = MOST, example: object = None) -> Bound:
    return Bound(least, most, least if example is None else example)


def _positive(example: object) -> Bound:
    return Bound(SMALLEST_FLOAT, LARGEST_FLOAT, example)


def _not_negative(example: object) -> Bound:
    return Bound(0.0, LARGEST_FLOAT, example)


def _share(example: object) -> Bound:
    return Bound(0.0, 1.0, example, is_below=True)


BOUNDS: Mapping[str, Bound] = {
    "clients": _count(),
    "clients_per_round": _count(),
    "ranks_per_client": _count(1, 4096),
    "rounds": _count(),
    "local_steps": _count(most=10**6),
    "local_epochs": _count(),
    "batch_size": _count(),
    "seed": _count(0, 2**32 - 1),
    "eval_every": _count(),
    "eval_train_samples": _count(0),
    "eval_clients": _count(),
    "check_every": _count(),
    "threads": _count(1, 4096),
    "algorithm.synchronised_steps": _count(0, example=1),
    "algorithm.synchronise_every": _count(),
    "algorithm.deviation_limit": _positive(0.5),
    "algorithm.fraction": Bound(0.0, 1.0, 0.5),
    "algorithm.choosing_rounds": _count(example=3),
    "algorithm.switch_round": _count(2),
    "algorithm.groups": _count(1, 2**16),
    "client.proximal_mu": _not_negative(0.01),
    "server.lr": _positive(0.01),
    "server.momentum": _share(0.9),
    "server.beta2": _share(0.99),
    "server.tau": _positive(1e-3),
    "data.train_samples": _count(),
    "data.test_samples": _count(),
    "data.workers": _count(0, 256, 2),
    "data.image_size": _count(1, 10_000, 224),
    "data.resize": _count(1, 10_000, 224),
    "data.crop_padding": _count(0, 10_000),
    "data.colour_jitter": Bound(0.0, 1.0, 0.4),
    "data.samples": _count(1, example=10_000),
    "data.shape": _count(1, 10**8, [3, 32, 32]),
    "data.classes": _count(2, 10**7, 10),
    "task.class_weights": _not_negative([1, 2]),
    "task.label_smoothing": _share(0.1),
    "task.ignore_index": _count(-(2**31), 2**31 - 1, 255),
    "partition.classes_per_client": _count(1, 10**7, 2),
    "partition.alpha": Bound(SMALLEST_FLOAT, 1e6, 0.5),
    "partition.strength": Bound(SMALLEST_FLOAT, 1000.0, 2),
    "optimizer.lr": _positive(0.1),
    "optimizer.momentum": _share(0.9),
    "optimizer.betas": _share([0.9, 0.999]),
    "optimizer.eps": _positive(1e-8),
    "optimizer.weight_decay": _not_negative(1e-4),
    "optimizer.clip_norm": _positive(1.0),
    "lr_schedule.milestones": _count(1, example=[60, 80]),
    "lr_schedule.gamma": Bound(SMALLEST_FLOAT, 10.0, 0.1),
    "lr_schedule.warmup_rounds": _count(0),
    "lr_schedule.power": Bound(SMALLEST_FLOAT, 1e6, 1.0),
    "lr_schedule.final": Bound(0.0, 1.0, 0.01),
    "early_stopping.patience": _count(),
    "early_stopping.target": Bound(-LARGEST_FLOAT, LARGEST_FLOAT, 0.95),
    "comm.timeout_seconds": Bound(float(_LEAST_TIMEOUT_SECONDS), float(_YEAR_SECONDS), 300),
    "cohort.max_stacked": _count(),
    "checkpoint.every": _count(),
    "checkpoint.keep": _count(),
    "probe.every": _count(example=10),
}
"""Bounds of the options of a job."""
LAUNCH_BOUNDS: Mapping[str, Bound] = {
    "nodes": _count(1, 10**5),
    "tasks_per_node": _count(1, 4096),
    "gpus_per_task": _count(0, 64),
    "cpus_per_task": _count(0, 4096),
    "mem_gb": Bound(0.001, 1e6, 8),
    "timeout_min": _count(1, _YEAR_SECONDS // 60),
    "signal_delay_s": _count(1, _YEAR_SECONDS),
    "array_parallelism": _count(1, 10**5),
}
"""Bounds of the options of a submission."""


def beyond(options: object, bounds: Mapping[str, Bound], prefix: str = "") -> dict[str, str]:
    """Returns a line for each option with a number that is not valid, by the option's name."""
    return dict(_beyond(options, bounds, prefix))


def _beyond(options: object, bounds: Mapping[str, Bound], prefix: str) -> Iterator[tuple[str, str]]:
    for name, bound in bounds.items():
        value, option = attrgetter(name)(options), prefix + name
        is_list = isinstance(value, list)
        wrong = [each for each in _numbers(value) if not bound.contains(each)]
        if not wrong:
            continue
        allowed = f"a list, and each value {bound}" if is_list else str(bound)
        example = str(bound.example).replace(" ", "")
        if isinstance(bound.example, int) and wrong[0] > bound.most:
            example = _text(bound.most)
        yield option, format_option_error(option, value, allowed, f"try {option}={example}")


def _numbers(value: Any) -> list[float]:
    """Returns the numbers of an option, which may also be null or a word."""
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, int | float)]


def within(options: Options, bounds: Mapping[str, Bound]) -> Options:
    """Returns a copy of ``options`` whose numbers are the nearest valid ones."""
    changed = copy.deepcopy(options)
    for name, bound in bounds.items():
        group, _, field = name.rpartition(".")
        holder = attrgetter(group)(changed) if group else changed
        value = getattr(holder, field)
        if isinstance(value, list):
            setattr(holder, field, [bound.nearest(each) for each in _numbers(value)])
        elif isinstance(value, int | float):
            setattr(holder, field, bound.nearest(value))
    return changed
