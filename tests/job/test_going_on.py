"""A run goes on from the end of another one, or of its own, with options that may differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtan_hpc.config.enums import (
    AlgorithmName,
    OptimizerName,
    ServerOptimizerName,
    StoppingMode,
)
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EarlyStoppingConfig,
    ModelConfig,
    OptimizerConfig,
    ServerConfig,
    TrackingConfig,
)
from fedtan_hpc.config.validate import check
from fedtan_hpc.files import atomic_files
from fedtan_hpc.job.checkpoint_format import path_of
from tests.helpers.jobs import config_of, rounds_of, run, run_until, same_bits
from tests.helpers.ranks import on_ranks


def more(method: str, folder: Path, *names: str, **options: Any) -> Config:
    """Six rounds in place of the three of ``finished``."""
    return config_of(method, folder, resume_change=list(names or ("rounds",)), **options)


def finished(method: str, folder: Path, **options: Any) -> Path:
    run(config_of(method, folder, rounds=3, **options))
    return folder


@pytest.mark.parametrize(("method", "ranks"), [("fedavg", 1), ("fedbn", 2), ("centralised", 1)])
def test_a_finished_run_goes_on_elsewhere_as_one_of_more_rounds(
    method: str, ranks: int, tmp_path: Path
) -> None:
    """To the bit: server optimizer, private parts and momentum go on."""
    on_ranks(ranks, run, config_of(method, tmp_path / "old", rounds=3))
    config = more(method, tmp_path / "new", resume=str(tmp_path / "old"))
    [summary, *_] = on_ranks(ranks, run, config)
    on_ranks(ranks, run, config_of(method, tmp_path / "whole"))
    assert summary.resumed_after == [3]
    assert same_bits(tmp_path / "new", tmp_path / "whole")
    assert [line["round"] for line in rounds_of(tmp_path / "new")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "old" / "summary.json").read_text())["rounds"] == 3


def test_a_finished_run_goes_on_in_its_folder(tmp_path: Path) -> None:
    folder = finished("fedtan", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"another rounds: .* or add resume_change=\[rounds\]"):
        run(config_of("fedtan", folder))
    summary = run(more("fedtan", folder))
    assert (summary.rounds, summary.resumed_after) == (6, [3])
    assert json.loads((folder / "summary-round3.json").read_text())["rounds"] == 3
    assert "rounds: 6" in (folder / "config.yaml").read_text()
    assert run(more("fedtan", folder)) == summary
    assert run(config_of("fedtan", folder)) == summary


def test_an_end_before_the_options_are_written_leaves_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished("fedtan", tmp_path / "run")

    def full(*_: Any) -> None:
        raise OSError(28, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "replace_text", full)
        with pytest.raises(ConfigError, match="no space"):
            run(more("fedtan", folder))
    assert not (folder / "summary.json").exists()
    assert run(more("fedtan", folder)).resumed_after == [3]


def test_listed_options_may_differ_and_groups_stand_for_theirs(tmp_path: Path) -> None:
    old = str(finished("fedtan", tmp_path / "old") / "checkpoints")
    new = OptimizerConfig(lr=0.01, momentum=0.0)
    listed = {"optimizer": new, "batch_size": 8, "resume": old}
    with pytest.raises(ConfigError) as caught:
        run(more("fedtan", tmp_path / "new", "rounds", "optimizer.lr", **listed))
    [line] = caught.value.mistakes
    assert "with another batch_size, optimizer.lr, optimizer.momentum, rounds: give" in line
    assert "or add resume_change=[rounds,optimizer.lr,batch_size,optimizer.momentum]" in line
    run(more("fedtan", tmp_path / "new", "rounds", "optimizer", "batch_size", **listed))
    assert [line["learning_rate"] for line in rounds_of(tmp_path / "new")] == [0.1] * 3 + [0.01] * 3


def test_clients_of_another_algorithm_begin_with_the_models_layers(tmp_path: Path) -> None:
    old = finished("fedtan", tmp_path / "old")
    [*_] = run(more("fedbn", tmp_path / "new", "rounds", "algorithm", resume=str(old))).versions
    averaged, after = (torch.load(tmp_path / name / "model.pt") for name in ("old", "new"))
    assert torch.equal(averaged["2.running_mean"], after["2.running_mean"])
    assert not torch.equal(averaged["1.weight"], after["1.weight"])


SERVER = ServerConfig(optimizer=ServerOptimizerName.yogi)
MISFITS = [
    (
        "fedtan",
        "rounds",
        {"rounds": 3, "resume_change": ["rounds", "seed"], "seed": 7},
        "more than",
    ),
    ("fedtan", "model", {"model": ModelConfig(name="cnn")}, "0.weight of the network is"),
    ("fedbn", "clients", {"clients": 3, "clients_per_round": None}, "clients=3: client 3 has"),
    (
        *("fedbn", "algorithm"),
        {"algorithm": AlgorithmConfig(name=AlgorithmName.fedavg)},
        "clients of fedbn have kept other parts",
    ),
    ("fedavg", "server", {"server": SERVER}, "server.optimizer=yogi: the state is that of adam"),
    (
        *("fedavg", "algorithm"),
        {
            "algorithm": AlgorithmConfig(name=AlgorithmName.fedbn),
            "server": ServerConfig(optimizer=ServerOptimizerName.adam),
        },
        "the server of fedavg has stepped other parts",
    ),
]


@pytest.mark.parametrize(("method", "group", "options", "words"), MISFITS)
def test_a_state_that_does_not_fit_is_refused(
    method: str, group: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Before anything in the folder changes."""
    folder = finished(method, tmp_path / "run")
    names = ["rounds", "clients_per_round", group]
    with pytest.raises(ConfigError) as caught:
        run(config_of(method, folder, **{"resume_change": names, **options}))
    [line] = caught.value.mistakes
    assert words in line
    assert (folder / "summary.json").exists()


def test_a_finished_run_without_a_checkpoint_does_not_begin_anew(tmp_path: Path) -> None:
    folder = finished("fedtan", tmp_path / "run", checkpoint=CheckpointConfig(every=None))
    assert not (folder / "checkpoints").exists()
    with pytest.raises(ConfigError, match="this finished run has none"):
        run(more("fedtan", folder))
    assert (folder / "summary.json").exists()


def test_a_model_is_no_checkpoint(tmp_path: Path) -> None:
    path = finished("fedtan", tmp_path / "old") / "model.pt"
    with pytest.raises(ConfigError, match=f"with model.weights={path}"):
        run(more("fedtan", tmp_path / "new", resume=str(path)))


def test_names_that_are_no_options_are_mistakes() -> None:
    config = Config(resume="never", resume_change=["optimizer.lrr", "optimizer"])
    with pytest.raises(ConfigError) as caught:
        check(config)
    anew, name = caught.value.mistakes
    assert anew.startswith("resume_change=[optimizer.lrr,optimizer]: allowed is empty with")
    assert name.endswith("did you mean optimizer.lr?")


def test_a_run_that_ended_early_goes_on_without_that_end(tmp_path: Path) -> None:
    early = EarlyStoppingConfig(metric="test_accuracy", target=0.1)
    options: dict[str, Any] = {"eval_every": 1, "checkpoint": CheckpointConfig(every=5)}
    ended = run(config_of("fedtan", tmp_path / "old", early_stopping=early, **options))
    assert (ended.rounds, ended.best_round) == (1, 1)
    config = more("fedtan", tmp_path / "new", "early_stopping", **options)
    config.resume = str(tmp_path / "old")
    summary = run(config)
    assert (summary.rounds, summary.resumed_after) == (6, [1])
    run(config_of("fedtan", tmp_path / "whole", **options))
    assert same_bits(tmp_path / "new", tmp_path / "whole")


def small(method: str, folder: Path, *names: str, **options: Any) -> Config:
    """A faster job; with ``names``, one that goes on with other values of these options."""
    data = DataConfig(train_samples=80, test_samples=20)
    fast = {"data": data, "tracking": TrackingConfig(to=[]), "rounds": 3, "eval_every": 1}
    return config_of(method, folder, resume_change=list(names), **{**fast, **options})


def test_a_state_that_is_not_used_is_dropped(tmp_path: Path) -> None:
    """It does not have to fit, and later it is not taken for that of the rounds since then."""
    run(small("centralised", tmp_path / "pooled", rounds=2))
    names = "rounds", "algorithm", "optimizer", "clients_per_round"
    adam = OptimizerConfig(name=OptimizerName.adam, lr=0.01)
    config = small("fedtan", tmp_path / "fedtan", *names, optimizer=adam)
    run(replace(config, resume=str(tmp_path / "pooled")))
    assert torch.load(path_of(tmp_path / "fedtan", 3))["optimizer"] == {}
    folder = tmp_path / "server"
    run(small("fedavg", folder, rounds=1))
    assert torch.load(path_of(folder, 1))["server"][0].numel()
    run(small("fedavg", folder, "rounds", "server", server=ServerConfig()))
    assert not torch.load(path_of(folder, 3))["server"][0].numel()


def test_a_run_that_goes_on_ends_early_at_an_evaluation(tmp_path: Path) -> None:
    """Also if the new target was reached before the round after which the run was interrupted."""
    options = {"eval_every": 2, "rounds": 6}
    run_until(small("fedtan", tmp_path, **options), 3)
    reached = EarlyStoppingConfig(metric="test_accuracy", target=0.0)
    summary = run(small("fedtan", tmp_path, "early_stopping", early_stopping=reached, **options))
    assert summary.rounds == 4
    assert summary.test_loss > 0


def test_rounds_before_a_change_may_lack_the_metric(tmp_path: Path) -> None:
    run_until(small("fedtan", tmp_path, eval_train_samples=0), 2)
    by_loss = EarlyStoppingConfig(metric="pooled_train_loss", patience=5)
    names = "early_stopping", "eval_train_samples"
    assert run(small("fedtan", tmp_path, *names, early_stopping=by_loss)).best_round == 3


def by_loss(mode: StoppingMode) -> EarlyStoppingConfig:
    return EarlyStoppingConfig(metric="test_loss", mode=mode)


def test_the_best_model_comes_along_if_its_round_is_still_the_best(tmp_path: Path) -> None:
    """The largest loss counts, that of the first evaluation."""
    old, worst = tmp_path / "old", by_loss(StoppingMode.max)
    run(small("fedtan", old, rounds=2, early_stopping=worst))
    best = (old / "best.pt").read_bytes()
    options = {"resume": str(old), "early_stopping": worst}
    assert run(small("fedtan", tmp_path / "new", "rounds", **options)).best_round == 1
    assert (tmp_path / "new" / "best.pt").read_bytes() == best
    run(small("fedbn", tmp_path / "own", "rounds", "algorithm", **options))
    assert not (tmp_path / "own" / "best.pt").exists()
    options["early_stopping"] = by_loss(StoppingMode.min)
    run(small("fedtan", tmp_path / "min", "rounds", "early_stopping", **options))
    assert (tmp_path / "min" / "best.pt").read_bytes() != best


def test_the_best_model_of_a_round_that_is_trained_again_is_renamed(tmp_path: Path) -> None:
    """The run was killed after round 3, the best one, of which it kept no checkpoint."""
    least = by_loss(StoppingMode.min)
    run(small("fedtan", tmp_path, early_stopping=least))
    (tmp_path / "summary.json").unlink()
    path_of(tmp_path, 3).unlink()
    best = (tmp_path / "best.pt").read_bytes()
    slow = OptimizerConfig(lr=1e-9)
    summary = run(small("fedtan", tmp_path, "optimizer", optimizer=slow, early_stopping=least))
    assert summary.resumed_after == [2]
    assert (tmp_path / "best.abandoned").read_bytes() == best
    found, last = torch.load(tmp_path / "best.pt"), torch.load(tmp_path / "model.pt")
    assert torch.equal(found["1.weight"], last["1.weight"])
