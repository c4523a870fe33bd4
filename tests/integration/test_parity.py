"""One round of the FedTAN authors' code, reproduced tensor by tensor on ResNet-20."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedtan_hpc import average_model, convert_batchnorm, federated_statistics
from fedtan_hpc.models.resnet import resnet20
from tests.helpers.ranks import on_ranks

ROUNDS = ["E1", "E3"]
Layer = nn.Conv2d | nn.modules.batchnorm._BatchNorm | nn.Linear


@cache
def recorded(name: str) -> dict[str, Any]:
    path = Path(__file__).parent / "parity" / f"parity_{name}.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def layers(module: nn.Module) -> dict[str, Layer]:
    """Convolutions, BN layers and the linear layer by kind and number, in the network's order."""
    kinds: dict[str, type[Layer]] = {
        "conv": nn.Conv2d,
        "bn": nn.modules.batchnorm._BatchNorm,
        "linear": nn.Linear,
    }
    count = dict.fromkeys(kinds, 0)
    found: dict[str, Layer] = {}
    for layer in module.modules():
        for kind, of_kind in kinds.items():
            if isinstance(layer, of_kind):
                found[f"{kind}_{count[kind]}"] = layer
                count[kind] += 1
    return found


def draw(layer: Layer, random: np.random.RandomState) -> tuple[npt.NDArray[np.float64], ...]:
    """The initial parameters of a layer."""
    shape = tuple(layer.weight.shape)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return random.uniform(0.5, 1.5, shape), random.uniform(-0.5, 0.5, shape)
    fan_in = layer.weight[0].numel()
    weight = random.standard_normal(shape) * np.sqrt(2 / fan_in)
    if isinstance(layer, nn.Linear):
        return weight, random.uniform(-0.1, 0.1, shape[0])
    return (weight,)


def recipe(name: str) -> tuple[Tensor, Tensor, nn.Module]:
    """The inputs and labels of all clients (K, E, B, ...), and the initial network."""
    job = recorded(name)
    K, E, B = job["clients"], job["local_steps"], job["batch_size"]
    random = np.random.RandomState(job["seed"])
    shift = 0.5 * np.arange(K).reshape(K, 1, 1, 1, 1, 1)
    x = random.standard_normal((K, E, B, 3, 32, 32)) + shift
    y = random.randint(0, 10, (K, E, B))
    module = convert_batchnorm(resnet20(in_channels=3, classes=10)).double()
    for layer in layers(module).values():
        for parameter, value in zip(layer.parameters(), draw(layer, random), strict=True):
            parameter.data = torch.from_numpy(value)
    return torch.from_numpy(x), torch.from_numpy(y), module


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics by their names in the record."""
    return {
        f"{name}.{key}": value.clone()
        for name, layer in layers(module).items()
        for key, value in layer.state_dict().items()
        if key != "num_batches_tracked"
    }


def use_the_authors_factor(module: nn.Module, clients: int, batch_size: int) -> None:
    """Changes the first step's running variances to 0.9 + 0.1 variance B / (B - 1)."""
    for layer in layers(module).values():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            side = 512 // layer.num_features  # 16, 32 and 64 channels on 32, 16 and 8 pixels
            n = clients * batch_size * side * side
            factor = (n - 1) / n * batch_size / (batch_size - 1)
            assert layer.running_var is not None
            layer.running_var.sub_(0.9).mul_(factor).add_(0.9)


def play_round(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the tensors before and after one round with one client on each rank."""
    job, rank = recorded(name), dist.get_rank()
    xs, ys, module = recipe(name)
    before = tensors(module)
    share = 1 / job["clients"]
    optimizer = new_optimizer(module, job)
    with federated_statistics(module, share):
        cross_entropy(module(xs[rank, 0]), ys[rank, 0]).backward()
    optimizer.step()
    use_the_authors_factor(module, job["clients"], job["batch_size"])
    take_local_steps(module, job, xs[rank, 1:], ys[rank, 1:])
    average_model(module, share)
    return before, tensors(module)


def new_optimizer(module: nn.Module, job: dict[str, Any]) -> torch.optim.SGD:
    """A new optimizer has no momentum in its first step; weight decay is in every step."""
    options = {key: job[key] for key in ("lr", "momentum", "weight_decay")}
    return torch.optim.SGD(module.parameters(), **options)


def take_local_steps(module: nn.Module, job: dict[str, Any], xs: Tensor, ys: Tensor) -> None:
    optimizer = new_optimizer(module, job)
    for x, y in zip(xs, ys, strict=True):
        optimizer.zero_grad()
        cross_entropy(module(x), y).backward()
        optimizer.step()


@cache
def round_by_rank(name: str) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return on_ranks(recorded(name)["clients"], play_round, name)


@pytest.mark.parametrize("name", ROUNDS)
def test_the_round_has_the_authors_97_tensors(name: str) -> None:
    _, after = round_by_rank(name)[0]
    expected = {key: tuple(value["shape"]) for key, value in recorded(name)["tensors"].items()}
    assert {key: tuple(value.shape) for key, value in after.items()} == expected
    assert len(expected) == 97


@pytest.mark.parametrize("name", ROUNDS)
def test_every_tensor_is_that_of_the_authors(name: str) -> None:
    before, after = round_by_rank(name)[0]
    for key, expected in recorded(name)["tensors"].items():
        step_norm = expected["step_norm"]
        assert float((after[key] - before[key]).norm()) == pytest.approx(step_norm, rel=1e-9), key
        assert float(after[key].sum()) == pytest.approx(expected["sum"], rel=1e-9), key
        assert after[key].flatten()[:6].tolist() == pytest.approx(expected["head"], rel=1e-9), key


@pytest.mark.parametrize("name", ROUNDS)
def test_every_rank_ends_the_round_with_the_same_bits(name: str) -> None:
    (_, first), *others = round_by_rank(name)
    for _, other in others:
        assert all(torch.equal(other[key], value) for key, value in first.items())
