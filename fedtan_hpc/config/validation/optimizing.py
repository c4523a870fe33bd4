"""Mistakes in optimizer, learning rate, number of local steps and early stopping.

Used by ``validate`` and, once the sizes of the clients are known, by ``job.setup``.
"""

from collections.abc import Iterator, Sequence
from math import log10
from typing import Any

from ..algorithms import ALGORITHMS
from ..enums import LrScheduleName, OptimizerName, StoppingMode
from ..errors import format_option_error
from ..schema import Config
from .bounds import LARGEST_FLOAT
from .task import METRICS

_DEFAULT = Config()
_STEPS = _DEFAULT.local_steps


def optimizing_mistakes(config: Config) -> Iterator[str]:
    """Yields one line for each mistake."""
    yield from _optimizer(config)
    yield from _schedule(config)
    yield from _epochs(config)
    yield from _stopping(config)


def epoch_mistakes(config: Config, steps: Sequence[int]) -> Iterator[str]:
    """Yields a line for each mistake of ``local_epochs`` with the ``steps`` E_k of the clients."""
    epochs, least, most = config.local_epochs, min(steps), max(steps)
    if epochs is None:
        return
    synchronised = config.algorithm.synchronised_steps
    if synchronised is None:
        synchronised = ALGORITHMS[config.algorithm.name].synchronised_steps
    if synchronised is None and least < most:
        allowed = f"null with algorithm={config.algorithm.name}, whose clients take equal steps"
        remedy = f"here they would take {least} to {most}: set local_steps, or use partition=iid"
        yield format_option_error("local_epochs", epochs, allowed, remedy)
    if synchronised is not None and synchronised > least:
        allowed = f"0 to {least}, the steps of the smallest client in local_epochs={epochs}"
        remedy = "set fewer synchronised steps, more epochs or a smaller batch_size"
        yield format_option_error("algorithm.synchronised_steps", synchronised, allowed, remedy)


def _optimizer(config: Config) -> Iterator[str]:
    options, name = config.optimizer, config.optimizer.name
    is_sgd = name is OptimizerName.sgd
    if options.nesterov and is_sgd and not options.momentum:
        allowed, remedy = "false without momentum", "set optimizer.momentum=0.9 or leave it out"
        yield format_option_error("optimizer.nesterov", "true", allowed, remedy)
    given: dict[str, Any] = {"momentum": options.momentum or None}
    given["nesterov"] = "true" if options.nesterov else None
    if is_sgd:
        given = {"betas": options.betas, "eps": options.eps}
    users = "adam or adamw" if is_sgd else "sgd"
    for option, value in given.items():
        if value is not None:
            neutral = {"momentum": "0", "nesterov": "false"}.get(option, "null")
            remedy = f"leave it out or use optimizer={users}"
            allowed = f"{neutral} with optimizer={name}"
            yield format_option_error(f"optimizer.{option}", value, allowed, remedy)
    betas = options.betas
    if betas is not None and len(betas) != 2:
        allowed, remedy = "two numbers", "try optimizer.betas=[0.9,0.999]"
        yield format_option_error("optimizer.betas", betas, allowed, remedy)
    if not options.decay_norm and not options.weight_decay:
        allowed, remedy = "true without weight decay", "set optimizer.weight_decay or leave it out"
        yield format_option_error("optimizer.decay_norm", "false", allowed, remedy)


def _schedule(config: Config) -> Iterator[str]:
    schedule, name = config.lr_schedule, config.lr_schedule.name
    milestones = schedule.milestones
    if milestones != sorted(set(milestones)):
        allowed = "a list of rounds >= 1 in ascending order"
        remedy = "for example lr_schedule.milestones=[60,80]"
        yield format_option_error("lr_schedule.milestones", milestones, allowed, remedy)
    is_multistep = name is LrScheduleName.multistep
    if not is_multistep and milestones:
        remedy = "leave it out or use lr_schedule=multistep"
        allowed = f"[] with lr_schedule={name}"
        yield format_option_error("lr_schedule.milestones", milestones, allowed, remedy)
    if not is_multistep and schedule.gamma != _DEFAULT.lr_schedule.gamma:
        allowed = f"{_DEFAULT.lr_schedule.gamma} with lr_schedule={name}, which has no milestones"
        remedy = "leave it out or use lr_schedule=multistep"
        yield format_option_error("lr_schedule.gamma", schedule.gamma, allowed, remedy)
    steps = len(milestones) * log10(schedule.gamma)
    if steps + log10(config.optimizer.lr) > log10(LARGEST_FLOAT):
        allowed = f"a factor that keeps the rate below {LARGEST_FLOAT:g} after all milestones"
        remedy = "try lr_schedule.gamma=0.1"
        yield format_option_error("lr_schedule.gamma", schedule.gamma, allowed, remedy)
    if not 0 <= schedule.warmup_rounds < max(config.rounds, 1):
        allowed = f"0 to {max(config.rounds, 1) - 1}, fewer than rounds"
        remedy = "set more rounds or a shorter warm-up"
        yield format_option_error(
            "lr_schedule.warmup_rounds", schedule.warmup_rounds, allowed, remedy
        )


def _epochs(config: Config) -> Iterator[str]:
    if config.local_epochs is not None and config.local_steps != _STEPS:
        allowed = "null beside local_steps, because only one of them can count"
        remedy = f"leave one of them out (local_steps={config.local_steps} is set)"
        yield format_option_error("local_epochs", config.local_epochs, allowed, remedy)


def _stopping(config: Config) -> Iterator[str]:
    options = config.early_stopping
    metric = options.metric
    given: dict[str, Any] = {"patience": options.patience, "target": options.target}
    given["mode"] = None if options.mode is StoppingMode.auto else options.mode
    if metric is None:
        for option, value in given.items():
            if value is not None:
                neutral = "auto" if option == "mode" else "null"
                allowed = f"{neutral} without early_stopping.metric"
                remedy = "set early_stopping.metric=test_accuracy or leave it out"
                yield format_option_error(f"early_stopping.{option}", value, allowed, remedy)
        return
    known = [f"test_{name}" for name in METRICS.get(config.task.name, ())]
    is_known = metric in known if known else metric.startswith("test_")
    if not is_known and metric not in ("pooled_train_loss", "test_loss"):
        names = ", ".join(known or ["the metrics of your task as test_NAME"])
        allowed = f"{names}, test_loss or pooled_train_loss with task={config.task.name}"
        remedy = f"try early_stopping.metric={known[0] if known else 'test_loss'}"
        yield format_option_error("early_stopping.metric", metric, allowed, remedy)
    if metric == "pooled_train_loss" and config.eval_train_samples == 0:
        allowed, remedy = "a test metric with eval_train_samples=0", "set eval_train_samples=10000"
        yield format_option_error("early_stopping.metric", metric, allowed, remedy)
