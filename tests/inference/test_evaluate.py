"""A finished run's model on its own test set and on others: figures, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtan_hpc import evaluate as command
from fedtan_hpc.config.enums import NormName, PartitionName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import ModelConfig, PartitionConfig
from fedtan_hpc.data.batching import Moments, Samples
from fedtan_hpc.inference.evaluate import _Renormalised
from tests.inference.test_saved_run import finished, summary_of


def figures_of(folder: Path, *words: str, **own: str) -> dict[str, Any]:
    return command.evaluated({"run_dir": str(folder), **own}, words)


def test_without_other_data_the_figures_are_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shifted = PartitionConfig(name=PartitionName.feature_shift)
    cases: dict[str, dict[str, Any]] = {"plain": {}, "shifted": {"partition": shifted}}
    for name, options in cases.items():
        folder, out = tmp_path / name, tmp_path / f"{name}.json"
        finished(folder, **options)
        command.main([f"run_dir={folder}", f"out={out}"])
        figures, summary = json.loads(out.read_text()), summary_of(folder)
        assert figures["test_accuracy"] == summary["test_accuracy"]
        assert figures["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
        assert f"model global model  samples 360  test_loss {figures['test_loss']:.6g}" in (
            capsys.readouterr().out
        )


@pytest.mark.parametrize("norm", [NormName.none, NormName.ln])
def test_a_network_with_other_norm_layers_is_evaluated(norm: NormName, tmp_path: Path) -> None:
    finished(tmp_path, "fedavg", model=ModelConfig(norm=norm))
    figures = figures_of(tmp_path)
    assert figures["test_accuracy"] == summary_of(tmp_path)["test_accuracy"]


def test_clients_models_are_evaluated_alone_or_all(tmp_path: Path) -> None:
    finished(tmp_path, "fedbn")
    every = figures_of(tmp_path)
    assert every["model"] == "mean over the models of 3 clients"
    assert every["test_accuracy"] == pytest.approx(summary_of(tmp_path)["test_accuracy"], abs=1e-9)
    single = [figures_of(tmp_path, client=str(k))["test_accuracy"] for k in range(3)]
    assert len(set(single)) > 1
    assert sum(single) / 3 == pytest.approx(every["test_accuracy"], abs=1e-9)


def test_other_data_are_evaluated_with_single_options_or_a_new_group(tmp_path: Path) -> None:
    finished(tmp_path)
    part = figures_of(tmp_path, "data.test_samples=50")
    assert part["samples"] == 50
    other = figures_of(
        *(tmp_path, "data=synthetic", "data.shape=[1,8,8]"), "data.classes=10", "data.samples=100"
    )
    assert other["samples"] == 20
    assert other["test_accuracy"] < summary_of(tmp_path)["test_accuracy"]


def test_inputs_are_normalised_as_in_the_run() -> None:
    raw = torch.rand(6, 2, 3, 3, dtype=torch.float64) * 255
    before, after = Moments([10.0, 20.0], [2.0, 4.0]), Moments([7.0, 9.0], [3.0, 5.0])

    def normalised(moments: Moments) -> torch.Tensor:
        mean, deviation = (torch.tensor(each).view(-1, 1, 1) for each in moments)
        return (raw - mean) / deviation

    read = [Samples(normalised(before), torch.zeros(6, dtype=torch.int64))]
    [batch] = _Renormalised(read, before, after)  # type: ignore[arg-type]
    torch.testing.assert_close(batch.inputs, normalised(after))
    assert list(_Renormalised(read, None, after)) == read  # type: ignore[arg-type]


MISTAKES: dict[str, tuple[list[str], dict[str, str], str]] = {
    "classes": (["data=synthetic", "data.classes=7"], {}, "data with the 10 classes of the run"),
    "shape": (["data=synthetic"], {}, "whose samples the network of the run takes"),
    "client": ([], {"client": "0"}, "algorithm=fedtan gives no client a model"),
    "number": ([], {"client": "first"}, "client=first: allowed is the number"),
    "folder": ([], {"run_dir": "none"}, "none is not the folder of a run"),
    "no folder": ([], {"run_dir": ""}, "run_dir=null: allowed is the folder"),
    "best": ([], {"best": "yes"}, "best=yes: allowed is true or false"),
    "data": (["data.crop_padding=-1"], {}, "data.crop_padding=-1: allowed is"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "plain"
    finished(folder)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, plain: Path) -> None:
    job, own, words = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        figures_of(plain, *job, **own)
    [line] = caught.value.mistakes
    assert words in line
    assert "\n" not in line


def test_options_of_training_are_not_understood() -> None:
    with pytest.raises(ConfigError, match=r"rounds=3: not understood; the options here are run_"):
        command._check_words(["data=digits", "rounds=3"])
