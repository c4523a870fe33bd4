"""Initial values from files, and the patterns of what is frozen."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtan_hpc.batchnorm.conversion import convert_batchnorm
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import Config, DataConfig, ModelConfig
from fedtan_hpc.job import dry_run
from fedtan_hpc.job.setup import prepare
from fedtan_hpc.models import weights
from fedtan_hpc.models.freezing import freeze
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU, iid_config


def net(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, classes))


def state() -> dict[str, Tensor]:
    return {name: value + 1 for name, value in net().state_dict().items()}


WRAPPED: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s},
    "model": lambda s: {"model": s, "optimizer": {}},
    "data_parallel": lambda s: {f"module.{name}": value for name, value in s.items()},
}


@pytest.mark.parametrize("kind", [*WRAPPED, "safetensors"])
def test_files_of_all_kinds_are_loaded(kind: str, tmp_path: Path) -> None:
    saved, path, module = state(), tmp_path / "w.pt", net()
    if kind == "safetensors":
        path = tmp_path / "w.safetensors"
        pytest.importorskip("safetensors.torch").save_file(saved, str(path))
    else:
        torch.save(WRAPPED[kind](saved), path)
    assert weights.load(module, str(path)) == f"model.weights={path}: 9 of 9 tensors loaded"
    for name, value in module.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_what_does_not_fit_stays_fresh_and_is_told(tmp_path: Path) -> None:
    path, module = tmp_path / "w.pt", net(classes=7)
    saved = state()
    del saved["1.num_batches_tracked"], saved["0.bias"]
    torch.save({**saved, "extra": torch.zeros(1)}, path)
    fresh = module.state_dict()["2.weight"].clone()
    line = weights.load(module, str(path))
    assert line.endswith(
        "5 of 9 tensors loaded; of another shape or kind: 2.weight (3, 5), here (7, 5), "
        "2.bias (3,), here (7,); not in the file: 0.bias; not here: extra"
    )
    assert torch.equal(module.state_dict()["2.weight"], fresh)


def test_tensors_without_plain_values_stay_fresh_and_are_told(tmp_path: Path) -> None:
    """Sparse, quantized and complex ones, and those of the meta device."""
    path, module, saved = tmp_path / "w.pt", net(), state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved["0.bias"] = torch.quantize_per_tensor(saved["0.bias"], 0.1, 0, torch.qint8)
        saved["0.weight"] = saved["0.weight"].to_sparse()
        saved["2.weight"] = saved["2.weight"].to(torch.complex64)
        saved["2.bias"] = saved["2.bias"].to("meta")
        torch.save(saved, path)
        line = weights.load(module, str(path))
    assert "5 of 9 tensors loaded; of another shape or kind: 0.weight (5, 4) sparse_coo, " in line
    assert "0.bias (5,) quantized, here (5,), 2.weight (3, 5) complex, here (3, 5) and 1" in line
    assert torch.equal(module.state_dict()["1.bias"], saved["1.bias"])


class Whole(nn.Module):
    """Pickled whole, as torch.save(model) does."""


CONTENTS: dict[str, tuple[Any, str]] = {
    "network": (Whole(), "has only tensors; save model.state_dict()"),
    "list": ([torch.zeros(2)], "save model.state_dict(), not a list"),
    "foreign": ({"other": torch.zeros(2)}, "those of the file are other, those of the network 0.w"),
}


@pytest.mark.parametrize("kind", [*CONTENTS, "missing", "damaged"])
def test_files_that_cannot_be_used_are_mistakes(kind: str, tmp_path: Path) -> None:
    path, words = tmp_path / "w.pt", {"missing": "No such file", "damaged": "a whole file of torch"}
    if kind == "damaged":
        torch.save(state(), path)
        path.write_bytes(path.read_bytes()[:-300])
    elif kind in CONTENTS:
        content, words[kind] = CONTENTS[kind]
        torch.save(content, path)
    with pytest.raises(ConfigError) as caught:
        weights.load(net(), str(path))
    [line] = caught.value.mistakes
    assert line.startswith(f"model.weights={path}: allowed is ")
    assert words[kind] in line


def test_safetensors_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedtan_hpc\[weights\]'"):
        weights.load(net(), str(tmp_path / "w.safetensors"))


def test_a_job_starts_from_the_weights_whatever_its_norm(tmp_path: Path) -> None:
    config = iid_config("fedtan", rounds=1)
    trained = prepare(config, CPU).model
    torch.save({n: v + 1 for n, v in trained.state_dict().items()}, tmp_path / "w.pt")
    for algorithm in ("fedbn", "fedavg_gn"):
        model = ModelConfig(name="cnn", weights=str(tmp_path / "w.pt"))
        [note] = dry_run.dry_run(iid_config(algorithm, model=model))
        assert "tensors loaded" in note
        loaded = prepare(iid_config(algorithm, model=model), CPU).model.state_dict()
        for name, value in loaded.items():
            assert torch.equal(value, trained.state_dict()[name] + 1), (algorithm, name)


def test_a_file_that_one_rank_lacks_is_a_mistake_on_all(tmp_path: Path) -> None:
    assert on_ranks(2, mistake_of_rank_1, str(tmp_path)) == ["model.weights"] * 2


def mistake_of_rank_1(folder: str) -> str:
    import fedtan_hpc
    from fedtan_hpc.distributed import process_group

    path = Path(folder) / "w.pt"
    model = ModelConfig(name="mlp", weights=str(path))
    data = DataConfig(train_samples=100, test_samples=50)
    config = Config(model=model, data=data, rounds=1, run_dir=f"{folder}/run")
    if process_group.rank() == 1:
        config.model.weights = f"{path}.missing"
    else:
        torch.save(prepare_state(data), path)
    with pytest.raises(ConfigError) as caught:
        fedtan_hpc.run(config, callbacks=[])
    return str(caught.value).partition("=")[0]


def prepare_state(data: DataConfig) -> dict[str, Tensor]:
    from fedtan_hpc.models import factory

    return dict(factory.build(ModelConfig(name="mlp"), (1, 8, 8), 10, 0).state_dict())


def test_patterns_name_parameters_and_layers() -> None:
    module = freeze(convert_batchnorm(net()), ["0.w*", "1"])
    frozen = [name for name, value in module.named_parameters() if not value.requires_grad]
    assert frozen == ["0.weight", "1.weight", "1.bias"]
    assert module[1].is_frozen  # type: ignore[index]


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["0", "1.weigth"], "model.freeze=1.weigth: allowed is names of layers or .* 1.weight"),
        (["*"], r"model.freeze=\[\*\]: allowed is patterns that leave a parameter to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_mistakes(patterns: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        freeze(convert_batchnorm(net()), patterns)
