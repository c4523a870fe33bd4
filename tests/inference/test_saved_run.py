"""The network of a finished run: what it predicts, whose it is, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedtan_hpc
from fedtan_hpc.batchnorm.layer import FedTANBatchNorm
from fedtan_hpc.config.enums import AlgorithmName, ModelSource, PrecisionName
from fedtan_hpc.config.schema import AlgorithmConfig, Config, ModelConfig
from fedtan_hpc.data import datasets
from tests.helpers.jobs import run_here, small


def finished(folder: Path, algorithm: str = "fedtan", **options: Any) -> Config:
    name = AlgorithmConfig(name=AlgorithmName(algorithm))
    config = small(3, rounds=2, local_steps=2, algorithm=name, **options)
    run_here(config, str(folder))
    return config


def summary_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return values


def accuracy(model: nn.Module, config: Config) -> float:
    dataset = datasets.load(config.data, config.seed)
    samples = dataset.take(dataset.test)
    inputs: Tensor = samples.inputs.to(next(model.parameters()).dtype)
    return float((model(inputs).argmax(1) == samples.labels).double().mean())


@pytest.mark.parametrize("algorithm", ["fedtan", "fbn", "hbn", "fedavg_gn"])
def test_the_network_predicts_as_the_run_did(algorithm: str, tmp_path: Path) -> None:
    config = finished(tmp_path, algorithm)
    model = fedtan_hpc.load_model(tmp_path)
    assert not any(isinstance(layer, FedTANBatchNorm) for layer in model.modules())
    assert not any(module.training for module in model.modules())
    assert accuracy(model, config) == summary_of(tmp_path)["test_accuracy"]


@pytest.mark.parametrize("algorithm", ["fedbn", "silobn", "singleset"])
def test_a_clients_network_has_its_own_parts(algorithm: str, tmp_path: Path) -> None:
    config = finished(tmp_path, algorithm, precision=PrecisionName.float64)
    models = [fedtan_hpc.load_model(str(tmp_path), client=client) for client in range(3)]
    assert {value.dtype for value in models[0].parameters()} == {torch.float64}
    mean = sum(accuracy(model, config) for model in models) / 3
    assert mean == pytest.approx(summary_of(tmp_path)["test_accuracy"], abs=1e-12)
    first, second = (dict(model.named_buffers())["2.running_mean"] for model in models[:2])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("algorithm", ["fedbn", "singleset"])
def test_a_clients_tensors_with_several_names_are_its_own(algorithm: str, tmp_path: Path) -> None:
    """Those of layers with two names, and buffers that no state_dict has."""
    target = "tests.helpers.networks:tangled"
    finished(tmp_path, algorithm, model=ModelConfig(source=ModelSource.import_, target=target))
    kept = torch.load(tmp_path / "clients.pt")[1]
    assert "also_bn.weight" in kept
    model = fedtan_hpc.load_model(tmp_path, client=1)
    for name, value in model.state_dict().items():
        if name in kept:
            assert torch.equal(value, kept[name]), name
    assert model.get_parameter("bn.weight") is model.get_parameter("also_bn.weight")
    assert torch.equal(model.get_parameter("second.weight"), model.get_parameter("first.weight"))


def test_the_best_model_is_loaded_where_there_is_one(tmp_path: Path) -> None:
    finished(tmp_path)
    assert fedtan_hpc.load_model(tmp_path, best=True).state_dict().keys()
    (tmp_path / "best.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"keeps no best\.pt"):
        fedtan_hpc.load_model(tmp_path, best=True)
    state = torch.load(tmp_path / "model.pt")
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / "best.pt")
    best = fedtan_hpc.load_model(tmp_path, best=True).state_dict()
    assert torch.equal(best["1.weight"], state["1.weight"] + 1)


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        fedtan_hpc.load_model(tmp_path / "none")
    finished(tmp_path / "run")
    with pytest.raises(ValueError, match="algorithm=fedtan gives no client"):
        fedtan_hpc.load_model(tmp_path / "run", client=0)
    (tmp_path / "run" / "model.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"model\.pt: it is damaged"):
        fedtan_hpc.load_model(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="not finished: start its command again"):
        fedtan_hpc.load_model(tmp_path / "run")


def test_a_client_that_never_took_part_has_no_model(tmp_path: Path) -> None:
    finished(tmp_path, "fedbn")
    with pytest.raises(ValueError, match=r"client=7 has no model.*0, 1, 2"):
        fedtan_hpc.load_model(tmp_path, client=7)


def test_a_network_that_cannot_be_imported_any_more_is_said(tmp_path: Path) -> None:
    target = ModelConfig(source=ModelSource.import_, target="tests.inference.test_saved_run:net")
    finished(tmp_path, model=target)
    assert fedtan_hpc.load_model(tmp_path).state_dict()
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("test_saved_run:net", "gone:net"))
    with pytest.raises(ValueError, match=r"model\.target=tests\.inference\.gone:net"):
        fedtan_hpc.load_model(tmp_path)


def net(shape: tuple[int, ...], classes: int) -> nn.Module:
    assert isinstance(shape, tuple)
    size = torch.Size(shape).numel()
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(size), nn.Linear(size, classes))
