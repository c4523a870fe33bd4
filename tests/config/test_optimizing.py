"""Optimizers, schedules, epochs and early stopping: mistakes, and learning rates."""

from __future__ import annotations

import math

import pytest

from fedtan_hpc import cli
from fedtan_hpc.config.enums import AlgorithmName, LrScheduleName, OptimizerName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import AlgorithmConfig, Config, LrScheduleConfig
from fedtan_hpc.config.validate import check
from fedtan_hpc.config.validation.optimizing import epoch_mistakes

METRIC = "early_stopping.metric=test_accuracy"
MISTAKES: list[tuple[list[str], str, str]] = [
    (["optimizer=rmsprop"], "optimizer", "rmsprop"),
    (["optimizer.nesterov=true"], "optimizer.nesterov", "true"),
    (["optimizer=adam", "optimizer.nesterov=true"], "optimizer.nesterov", "true"),
    (["optimizer=adam", "optimizer.momentum=0.9"], "optimizer.momentum", "0.9"),
    (["optimizer.betas=[0.9,0.99]"], "optimizer.betas", "[0.9, 0.99]"),
    (["optimizer=adamw", "optimizer.betas=[0.9]"], "optimizer.betas", "[0.9]"),
    (["optimizer=adamw", "optimizer.betas=[0.9,1]"], "optimizer.betas", "[0.9, 1.0]"),
    (["optimizer=adamw", "optimizer.betas=[a,1]"], "optimizer.betas", "[a,1]"),
    (["optimizer.eps=1e-8"], "optimizer.eps", "1e-08"),
    (["optimizer=adam", "optimizer.eps=0"], "optimizer.eps", "0.0"),
    (["optimizer.clip_norm=0"], "optimizer.clip_norm", "0.0"),
    (["optimizer.clip_norm=nan"], "optimizer.clip_norm", "nan"),
    (["optimizer.decay_norm=false"], "optimizer.decay_norm", "false"),
    (["lr_schedule=step"], "lr_schedule", "step"),
    (["lr_schedule=cosine", "lr_schedule.milestones=[5]"], "lr_schedule.milestones", "[5]"),
    (["lr_schedule=cosine", "lr_schedule.gamma=0.5"], "lr_schedule.gamma", "0.5"),
    (["lr_schedule=cosine", "lr_schedule.power=2"], "lr_schedule.power", "2.0"),
    (["lr_schedule.final=0.1"], "lr_schedule.final", "0.1"),
    (["lr_schedule=cosine", "lr_schedule.final=2"], "lr_schedule.final", "2.0"),
    (["lr_schedule=polynomial", "lr_schedule.power=0"], "lr_schedule.power", "0.0"),
    (["rounds=3", "lr_schedule.warmup_rounds=3"], "lr_schedule.warmup_rounds", "3"),
    (["lr_schedule.warmup_rounds=-1"], "lr_schedule.warmup_rounds", "-1"),
    (["model.weights="], "model.weights", ""),
    (["local_epochs=0"], "local_epochs", "0"),
    (["local_epochs=1", "local_steps=3"], "local_epochs", "1"),
    (["early_stopping.patience=3"], "early_stopping.patience", "3"),
    (["early_stopping.target=0.9"], "early_stopping.target", "0.9"),
    (["early_stopping.mode=max"], "early_stopping.mode", "max"),
    ([METRIC, "early_stopping.patience=0"], "early_stopping.patience", "0"),
    ([METRIC, "early_stopping.target=inf"], "early_stopping.target", "inf"),
    (["early_stopping.metric=accuracy"], "early_stopping.metric", "accuracy"),
    (
        ["early_stopping.metric=pooled_train_loss", "eval_train_samples=0"],
        "early_stopping.metric",
        "pooled_train_loss",
    ),
]


@pytest.mark.parametrize(("words", "option", "value"), MISTAKES, ids=lambda value: str(value))
def test_each_mistake_is_one_line(words: list[str], option: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        list(map(check, cli.compose(words)))
    [line] = caught.value.mistakes
    assert line.startswith(f"{option}={value}: allowed is ")
    assert "; " in line


def test_groups_choose_optimizer_and_schedule() -> None:
    words = ["optimizer=adamw", "optimizer.betas=[0.8,0.9]", "lr_schedule=polynomial"]
    [config] = cli.compose([*words, "lr_schedule.power=2", "local_epochs=2"])
    check(config)
    assert config.optimizer.name is OptimizerName.adamw
    assert (config.optimizer.lr, config.optimizer.betas) == (0.001, [0.8, 0.9])
    assert config.lr_schedule.name is LrScheduleName.polynomial


@pytest.mark.parametrize(
    ("algorithm", "steps", "option"),
    [
        (AlgorithmConfig(synchronised_steps=3), [2, 5], "algorithm.synchronised_steps"),
        (AlgorithmConfig(name=AlgorithmName.centralised), [2, 5], "local_epochs"),
        (AlgorithmConfig(synchronised_steps=2), [2, 5], ""),
        (AlgorithmConfig(name=AlgorithmName.centralised), [5, 5], ""),
        (AlgorithmConfig(name=AlgorithmName.fedavg), [2, 5], ""),
    ],
)
def test_synchronised_steps_are_those_of_all_clients(
    algorithm: AlgorithmConfig, steps: list[int], option: str
) -> None:
    found = [*epoch_mistakes(Config(algorithm=algorithm, local_epochs=1), steps)]
    assert [line.partition("=")[0] for line in found] == [option] * bool(option)


def factors(rounds: int, schedule: LrScheduleConfig) -> list[float]:
    return [schedule.factor(number, rounds) for number in range(1, rounds + 1)]


def test_milestones_come_after_the_warm_up() -> None:
    schedule = LrScheduleConfig(milestones=[4, 5], gamma=0.5, warmup_rounds=2)
    assert factors(6, schedule) == [0.5, 1, 1, 1, 0.5, 0.25]


def test_cosine_falls_to_its_final_value_and_trains_in_the_last_round() -> None:
    found = factors(4, LrScheduleConfig(name=LrScheduleName.cosine))
    assert found == pytest.approx([(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)])
    high = factors(5, LrScheduleConfig(name=LrScheduleName.cosine, final=0.2, warmup_rounds=1))
    assert high == pytest.approx([1.0] + [0.2 + 0.8 * each for each in found])
    assert found[-1] > 0


def test_polynomial_falls_linearly_by_default() -> None:
    linear = LrScheduleConfig(name=LrScheduleName.polynomial, warmup_rounds=2)
    assert factors(6, linear) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    square = LrScheduleConfig(name=LrScheduleName.polynomial, power=2, final=0.5)
    assert factors(2, square) == pytest.approx([1, 0.5 + 0.5 / 4])
