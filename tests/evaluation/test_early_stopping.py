"""Runs that end by a metric, and the model of the best evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedtan_hpc.config.enums import OptimizerName, StoppingMode
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import EarlyStoppingConfig, OptimizerConfig
from fedtan_hpc.evaluation.early_stopping import BestEvaluation
from fedtan_hpc.evaluation.loggers import Display
from fedtan_hpc.evaluation.records import RoundRecord
from tests.helpers.jobs import ROUNDS, config_of, rounds_of, run, run_until, same_bits, state_of
from tests.helpers.ranks import on_ranks

PLAIN = RoundRecord(
    round=1,
    train_loss=1.0,
    learning_rate=0.1,
    round_seconds=1.0,
    comm_messages=0,
    comm_bytes=0,
    payload_messages=0,
    payload_bytes=0,
    clients=1,
)


def stops(options: EarlyStoppingConfig, *values: float | None) -> int:
    """Returns the round after which a run with these accuracies or errors ends; 0: none.

    A round without a value is not evaluated.
    """
    best = BestEvaluation(options)
    for number, value in enumerate(values, 1):
        metrics = {} if value is None else {"test_error": value}
        loss = None if value is None else 0.5
        record = replace(PLAIN, round=number, test_loss=loss, test_accuracy=value, metrics=metrics)
        best.add(record)
        if best.reason_to_stop():
            return number
    return 0


def test_patience_counts_evaluations_without_a_better_value() -> None:
    options = EarlyStoppingConfig(metric="test_accuracy", patience=2)
    assert stops(options, 0.1, 0.2, 0.2, None, 0.1) == 5
    assert stops(options, 0.1, 0.05, 0.2, 0.2, 0.3, 0.1) == 0


def test_a_target_ends_the_run_when_it_is_reached() -> None:
    options = EarlyStoppingConfig(metric="test_accuracy", target=0.2)
    assert stops(options, 0.1, None, 0.2, 0.3) == 3
    assert stops(options, 0.1, 0.15) == 0


@pytest.mark.parametrize(
    ("metric", "mode", "end"),
    [
        ("test_error", StoppingMode.auto, 2),
        ("test_error", StoppingMode.max, 1),
        ("test_accuracy", StoppingMode.auto, 1),
        ("test_accuracy", StoppingMode.min, 2),
    ],
)
def test_the_name_says_whether_larger_is_better(metric: str, mode: StoppingMode, end: int) -> None:
    assert stops(EarlyStoppingConfig(metric=metric, mode=mode, target=0.2), 0.3, 0.1) == end


@pytest.mark.parametrize("name", ["test_loss", "pooled_train_loss", "test_mae", "test_rmse"])
def test_losses_and_errors_fall(name: str) -> None:
    best = BestEvaluation(EarlyStoppingConfig(metric=name))
    for number, value in enumerate((2.0, 1.0, 3.0), 1):
        metrics = {"test_mae": value, "test_rmse": value}
        record = replace(PLAIN, round=number, test_loss=value, pooled_train_loss=value)
        best.add(replace(record, metrics=metrics))
    assert (best.round, best.value) == (2, 1.0)


def test_without_a_metric_the_best_is_by_accuracy_or_else_by_loss() -> None:
    best = BestEvaluation(EarlyStoppingConfig())
    best.add(replace(PLAIN, test_loss=1.0, test_accuracy=0.5))
    best.add(replace(PLAIN, round=2, test_loss=0.5, test_accuracy=0.4))
    assert best.round == 1
    best = BestEvaluation(EarlyStoppingConfig())
    best.add(replace(PLAIN, test_loss=1.0))
    best.add(replace(PLAIN, round=2, test_loss=0.5))
    assert best.round == 2
    assert not best.reason_to_stop()


@pytest.mark.parametrize("metric", ["test_iou", "test_class_accuracy"])
def test_a_metric_that_the_task_lacks_is_one_line_on_every_rank(metric: str) -> None:
    best = BestEvaluation(EarlyStoppingConfig(metric=metric))
    best.add(PLAIN)
    record = replace(PLAIN, test_loss=1.0, metrics={"test_f1": 0.5, "test_class_accuracy": [0.5]})
    with pytest.raises(ConfigError, match=f"{metric}: allowed is .*test_loss.*test_f1; ") as caught:
        best.add(record)
    assert caught.value.on_all_ranks
    assert "test_class_accuracy |" not in str(caught.value)


def test_a_run_that_ends_early_is_finished(tmp_path: Path) -> None:
    """All ranks end after the same round; interrupted and resumed, they do too, to the bit."""
    ranks = 2
    target = EarlyStoppingConfig(metric="test_accuracy", target=0.6)
    folders = tmp_path / "whole", tmp_path / "parted"
    whole, parted = (config_of("fedtan", each, early_stopping=target) for each in folders)
    summary, *others = on_ranks(ranks, run, whole)
    ended = summary.rounds
    assert ended == 4 < ROUNDS
    assert all(other.rounds == ended for other in others)
    assert summary.stopped_early.startswith("test_accuracy 0.")
    assert (summary.best_round, summary.best_value) == (ended, summary.test_accuracy)
    assert [line["round"] for line in rounds_of(folders[0])] == list(range(1, ended + 1))
    assert run(whole).rounds == ended  # finished: not trained again
    on_ranks(ranks, run_until, parted, 3)
    resumed, *_ = on_ranks(ranks, run, parted)
    assert (resumed.rounds, resumed.stopped_early) == (ended, summary.stopped_early)
    assert same_bits(*folders)


def test_the_best_model_is_the_one_of_the_best_round(tmp_path: Path) -> None:
    """Here the loss is best in the middle, because the rate then is far too large."""
    optimizer = OptimizerConfig(lr=0.5, momentum=0.9)
    by_loss = EarlyStoppingConfig(metric="test_loss", mode=StoppingMode.max)
    config = config_of("fedavg", tmp_path / "run", eval_every=1, optimizer=optimizer)
    config.early_stopping = by_loss
    summary = run(config)
    losses = [line["test_loss"] for line in rounds_of(tmp_path / "run")]
    assert summary.best_value == max(losses)
    assert summary.best_round == losses.index(max(losses)) + 1
    short = config_of("fedavg", tmp_path / "short", eval_every=1, optimizer=optimizer)
    short.rounds, short.early_stopping = summary.best_round, by_loss
    run(short)
    best, expected = torch.load(tmp_path / "run" / "best.pt"), state_of(tmp_path / "short")
    assert best.keys() == expected.keys()
    assert all(torch.equal(best[name], value) for name, value in expected.items())


def test_a_resumed_run_knows_the_best_evaluation(tmp_path: Path) -> None:
    """The worst accuracy counts as the best one, so that it is that of the first round."""
    folder, worst = tmp_path / "run", EarlyStoppingConfig(metric="test_accuracy")
    worst.mode = StoppingMode.min
    config = config_of("fedtan", folder, eval_every=1, early_stopping=worst)
    run_until(config, 3)
    best = (folder / "best.pt").read_bytes()
    assert run(config).best_round == 1
    assert (folder / "best.pt").read_bytes() == best


def test_clients_with_models_of_their_own_have_no_best_model(tmp_path: Path) -> None:
    summary = run(config_of("fedbn", tmp_path / "run"))
    assert summary.best_round > 0
    assert not (tmp_path / "run" / "best.pt").exists()


def test_the_display_says_why_a_run_ended_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopping = EarlyStoppingConfig(metric="test_accuracy", target=0.1)
    summary = run(config_of("fedtan", tmp_path / "run", early_stopping=stopping))
    Display().run_ended(summary)
    assert "ended early" in capsys.readouterr().out


def test_pooled_adam_goes_on_after_an_interruption_as_without_one(tmp_path: Path) -> None:
    """Its moments and its number of steps are in the checkpoint, to the bit."""
    adam = OptimizerConfig(name=OptimizerName.adam, lr=0.01, clip_norm=1.0)
    folders = tmp_path / "whole", tmp_path / "parted"
    whole, parted = (config_of("centralised", each, optimizer=adam) for each in folders)
    on_ranks(2, run, whole)
    on_ranks(2, run_until, parted, 3)
    on_ranks(2, run, parted)
    assert same_bits(*folders)


def test_an_accuracy_that_is_not_finite_once_is_not_the_best() -> None:
    """A task of the user's may have none in some rounds."""
    best = BestEvaluation(EarlyStoppingConfig(metric="test_accuracy", patience=2))
    for number, accuracy in enumerate((0.5, None, None), 1):
        record = replace(PLAIN, round=number, test_loss=0.5, test_accuracy=accuracy)
        assert best.add(record) == (number == 1)
    assert best.reason_to_stop()
