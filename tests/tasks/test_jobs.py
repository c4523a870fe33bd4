"""Whole jobs of each task: one result for any ranks, ways to run clients, and compiled steps."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fedtan_hpc
from fedtan_hpc import cli
from fedtan_hpc.config.algorithms import plan
from fedtan_hpc.config.enums import TaskName
from fedtan_hpc.config.errors import ConfigError, RunError
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.data import datasets
from fedtan_hpc.data.batching import Draw
from fedtan_hpc.data.own.targets import TargetRule
from fedtan_hpc.evaluation.records import RoundRecord
from fedtan_hpc.job.setup import open_data, prepare
from fedtan_hpc.tasks.builtin import Regression, Segmentation
from fedtan_hpc.tasks.objective import Objective
from fedtan_hpc.training.local_step import LocalRun, Loss, RoundContext
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU, distance
from tests.helpers.task_data import HERE, IGNORED, mask_of

BASE = ["rounds=2", "local_steps=2", "batch_size=24", "eval_every=1", "precision=float64"]
BASE += ["partition=natural", "data=import", f"data.target={HERE}:sites", "optimizer.lr=0.05"]
OWN_NET = ["model=import", f"model.target={HERE}:pixels"]
MASKS = ["task=segmentation", "data.options.kind=masks", f"task.ignore_index={IGNORED}"]
TASKS = {
    "segmentation": [*MASKS, *OWN_NET, "task.class_weights=[1,2,3]"],
    "auxiliary": [*MASKS, "model=import", f"model.target={HERE}:with_auxiliary"],
    "multilabel": ["task=multilabel", "data.options.kind=labels", "task.label_smoothing=0.1"],
    "regression": ["task=regression", "data.options.kind=number"],
    "two numbers": ["task=regression", "data.options.kind=numbers"],
    "import": ["task=import", f"task.target={HERE}:Quantile", "data.options.kind=number"],
    "classification": ["data.options.kind=class", "task.class_weights=[1,2]"],
}
FIRST = {
    "segmentation": "test_iou",
    "auxiliary": "test_iou",
    "multilabel": "test_f1",
    "regression": "test_mae",
    "two numbers": "test_mae",
    "import": "test_below",
    "classification": "test_accuracy",
}


def composed(task: str, *words: str) -> Config:
    [config] = cli.compose([*BASE, *TASKS[task], *words])
    check(config)
    return config


def trained(options: Config) -> tuple[dict[str, Tensor], list[RoundRecord]]:
    trainer = prepare(options, CPU)
    records = trainer.train([])
    return dict(trainer.model.state_dict()), records


@cache
def expected(task: str, algorithm: str) -> tuple[dict[str, Tensor], list[RoundRecord]]:
    return trained(composed(task, "cohort.mode=sequential", f"algorithm={algorithm}"))


def assert_same(
    result: tuple[dict[str, Tensor], list[RoundRecord]], task: str, algorithm: str
) -> None:
    state, records = result
    other, others = expected(task, algorithm)
    assert distance(state, other) < 1e-10
    for mine, theirs in zip(records, others, strict=True):
        for name, value in theirs.line().items():
            if name.startswith(("test_", "clients_", "pooled_", "train_")):
                assert_close(mine.line()[name], value, name)


def assert_close(found: Any, value: Any, name: str) -> None:
    """Compares numbers, lists of numbers and nulls."""
    if isinstance(value, list):
        for each, other in zip(found, value, strict=True):
            assert_close(each, other, name)
    elif value is None or found is None:
        assert found is value, name
    else:
        assert found == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("algorithm", ["fedtan", "fedbn"])
@pytest.mark.parametrize("task", TASKS)
def test_ranks_and_stacks_change_nothing(task: str, algorithm: str) -> None:
    for words in (["cohort.mode=sequential"], ["cohort.mode=stacked"]):
        options = composed(task, f"algorithm={algorithm}", *words)
        for result in on_ranks(2, trained, options):
            assert_same(result, task, algorithm)
    assert_same(trained(options), task, algorithm)
    [*_, last] = expected(task, algorithm)[1]
    assert last.line()[FIRST[task]] is not None
    shown = f"clients_own_mix_{FIRST[task].removeprefix('test_')}_mean"
    assert 0 <= last.line()[shown] < 5


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "auxiliary", "regression"])
def test_compiled_steps_change_nothing(task: str, capfd: pytest.CaptureFixture[str]) -> None:
    options = composed(task, "compile=true", "cohort.mode=sequential")
    assert_same(trained(options), task, "fedtan")
    assert "cannot compile" not in capfd.readouterr().err


def test_the_metrics_are_those_of_the_union_of_all_test_samples() -> None:
    """Also where clients' own samples count apart: computed by hand, in one process."""
    options = composed("segmentation")
    config, opened = open_data(options, CPU)
    trainer = prepare(config, CPU, opened)
    [*_, last] = trainer.train([])
    dataset = opened.dataset
    assert dataset is not None
    task = Segmentation([1, 2, 3], 0.0, IGNORED)

    @torch.no_grad()
    def metrics(indices: Any) -> tuple[float, dict[str, Any]]:
        samples = dataset.take(indices).to(torch.device("cpu"), torch.float64)
        output = trainer.model.eval()(samples.inputs)
        sums = task.sums(output, samples.labels).double().sum(0)
        return float(task.losses(output, samples.labels).mean()), task.metrics(sums, len(indices))

    loss, whole = metrics(dataset.test)
    assert last.test_loss == pytest.approx(loss, rel=1e-9)
    assert last.metrics["test_iou"] == pytest.approx(float(whole["iou"]), rel=1e-9)
    assert last.metrics["test_iou_by_class"] == pytest.approx(whole["iou_by_class"].tolist())
    own = [float(metrics(each)[1]["iou"]) for each in dataset.client_tests.values()]
    assert last.metrics["clients_own_mix_iou_mean"] == pytest.approx(np.mean(own), rel=1e-9)
    assert last.metrics["clients_own_mix_iou_spread"] == pytest.approx(np.std(own, ddof=1))


@pytest.mark.parametrize("loading", ["device", "stream"])
def test_a_job_records_and_resumes_its_metrics(loading: str, tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path}", f"data.loading={loading}", "checkpoint.every=1"]
    options = composed("segmentation", *words)
    summary = fedtan_hpc.run(options, callbacks=[])
    assert summary.test_accuracy is None
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert "metrics" not in lines[-1]
    assert lines[-1]["test_dice"] == summary.metrics["test_dice"]
    (tmp_path / "summary.json").unlink()  # as if it had been killed at the very end
    again = fedtan_hpc.run(options, callbacks=[])
    assert again.metrics == summary.metrics
    assert RoundRecord.of_line(lines[-1]).line() == lines[-1]


def test_masks_are_flipped_and_cropped_as_their_images_are() -> None:
    """A mask follows from its image's pixels, wherever these are."""
    options = composed("segmentation", "data.flip=true", "data.crop_padding=1")
    trainer = prepare(options, CPU)
    [client] = trainer.store.host({1: 1.0})
    plain = client.samples.batch(Draw(1, 1, 0), torch.arange(len(client.samples)))
    run = LocalRun(trainer.model, client, RoundContext(1, 0.1, plan(options, 1)), options, Loss())
    batch = run.next_batch()
    border = (batch.inputs == 0).all(1)
    assert border.any()
    assert (batch.labels[border] == IGNORED).all()
    expected = torch.stack([mask_of(image) for image in batch.inputs])
    kept = batch.labels != IGNORED
    assert kept.sum() > border.sum()
    assert torch.equal(batch.labels[kept], expected[kept])
    firsts = {float(image[0, 2, 2]) for image in plain.inputs}
    assert not all(float(image[0, 2, 2]) in firsts for image in batch.inputs)  # some have moved


def test_a_transform_may_change_masks_too() -> None:
    """The mask follows from the pixels, before and after."""
    words = [f"data.transform={HERE}:with_target", "data.loading=device"]
    options = composed("segmentation", *words)
    dataset = datasets.load(options.data, 0, options.task)
    plain, changed = dataset.take(dataset.train), dataset.take(dataset.train, Draw(0, 1, 0))
    is_turned = (plain.inputs != changed.inputs).flatten(1).any(1)
    assert 0 < is_turned.sum() < len(is_turned)
    expected = torch.where(is_turned[:, None, None], plain.labels.flip(1), plain.labels)
    assert torch.equal(changed.labels, expected)


MISTAKES = {
    "target outside": ("segmentation", ["data.options.fault=x"], "class number 3, and allowed"),
    "no classes": ("segmentation", ["data.options.classes=null"], "the number of classes of their"),
    "labels of another length": ("multilabel", ["data.options.fault=x"], "has the shape (2,)"),
    "infinite number": ("regression", ["data.options.fault=x"], "a value that is not finite"),
    "shape of the scores": (
        "auxiliary",
        ["model.target=tests.helpers.task_data:of_numbers"],
        "those of this one are (2, 3)",
    ),
    "number of weights": ("segmentation", ["task.class_weights=[1,2]"], "each of the 3 classes"),
    "no task": ("import", [f"task.target={HERE}:no_task"], "it returned a int"),
    "arguments": ("import", ["task.options.a=1"], "it raised TypeError"),
    "losses": ("import", ["task.options.fault=losses"], "these are ()"),
    "sums": ("import", ["task.options.fault=sums"], "it raised IndexError: no such column"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, tmp_path: Path) -> None:
    task, words, part = MISTAKES[mistake]
    # A wrong target is found when its client's samples are read, in the first round at the latest.
    with pytest.raises((ConfigError, RunError)) as caught:
        fedtan_hpc.run(composed(task, *words, f"run_dir={tmp_path}"), callbacks=[])
    assert "\n" not in str(caught.value)
    assert part in str(caught.value)


OPTIONS = {
    "task.target": ["task=import"],
    "task.class_weights": ["task.class_weights=[1,-1]"],
    "task.label_smoothing": ["task.label_smoothing=1"],
    "task.ignore_index": ["task.ignore_index=3"],
    "task.name": ["task=segmentation", "data=digits", "data.target=null", "data.options={}"],
    "partition.name": ["task=regression", "partition=shards"],
    "partition.shift": ["task=segmentation", "partition=feature_shift"],
    "task.options": ["task.options={a: 1}"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_do_not_fit_are_refused(option: str) -> None:
    [config] = cli.compose([*BASE, *OPTIONS[option]])
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert any(line.startswith(f"{option}=") for line in caught.value.mistakes)


def test_targets_of_many_kinds_become_tensors() -> None:
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3)
    segmentation = TargetRule(TaskName.segmentation, 6, None)
    for target in (mask, Image.fromarray(mask), torch.from_numpy(mask)[None], mask.tolist()):
        assert segmentation.tensor(target).tolist() == mask.tolist()
    numbers = TargetRule(TaskName.regression, None, None)
    for value in (2, 2.0, np.float32(2), torch.tensor(2.0)):
        tensor = numbers.tensor(value)
        assert (tensor.dtype, tensor.shape, tensor.item()) == (torch.float32, (), 2)
    for value in ("text", None, [[1], [2, 3]]):
        with pytest.raises(ValueError, match="not a number, array or tensor"):
            numbers.tensor(value)


def test_a_users_task_gets_all_outputs_and_a_built_in_one_the_scores() -> None:
    output = {"logits": torch.ones(2, 3), "more": torch.zeros(2)}
    [config] = cli.compose(["task=import", f"task.target={HERE}:Quantile"])
    assert Objective.of(config).read(output) is output
    assert Objective(Regression()).read(output) is output["logits"]
    assert partial(Objective.of, config)().task.quantile == 0.5  # type: ignore[attr-defined]
