"""Small networks with every kind of BN layer, batches for their clients, and networks for jobs."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedtan_hpc.models import small_networks


class Shared(nn.Module):
    """One BN layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 5)
        self.bn = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn(self.first(x)))
        return self.head(torch.tanh(self.bn(self.second(x))))  # type: ignore[no-any-return]


class TwoPaths(nn.Module):
    """One BN layer that the module has under two names."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(5)
        self.layers = nn.Sequential(
            nn.Linear(6, 5), norm, nn.Tanh(), nn.Linear(5, 5), norm, nn.Tanh(), nn.Linear(5, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class TwoStatistics(nn.Module):
    """Two BN layers with one gamma and beta, and running statistics of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 5)
        self.bn1, self.bn2 = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
        self.bn2.weight, self.bn2.bias = self.bn1.weight, self.bn1.bias
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn1(self.first(x)))
        return self.head(torch.tanh(self.bn2(self.second(x))))  # type: ignore[no-any-return]


class Branches(nn.Module):
    """Two parallel branches with BN layers of equal width, whose messages could be confused."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.right = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Sigmoid())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.left(x) * self.right(x))  # type: ignore[no-any-return]


def _dense(**options: object) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 5),
        nn.BatchNorm1d(5, **options),  # type: ignore[arg-type]
        nn.Tanh(),
        nn.Linear(5, 4),
        nn.BatchNorm1d(4, **options),  # type: ignore[arg-type]
        nn.Tanh(),
        nn.Linear(4, 3),
    )


def _convolutional(conv: type[nn.Module], bn: type[nn.Module], channels: int) -> nn.Module:
    return nn.Sequential(
        conv(channels, 4, 3, padding=1),
        bn(4),
        nn.Tanh(),
        conv(4, 5, 3),
        bn(5),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def _offset() -> nn.Module:
    """BN directly on inputs whose mean is 1e3 times their spread."""
    return nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    )


def _without_momentum(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum = None
    return module


@dataclass(frozen=True)
class Case:
    """A network, the shape of a sample, and the offset of all inputs."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    offset: float = 0.0


CASES = {
    "1d": Case(_dense, (6,)),
    "1d-sequence": Case(lambda: _convolutional(nn.Conv1d, nn.BatchNorm1d, 2), (2, 7)),
    "2d": Case(lambda: _convolutional(nn.Conv2d, nn.BatchNorm2d, 3), (3, 5, 5)),
    "3d": Case(lambda: _convolutional(nn.Conv3d, nn.BatchNorm3d, 2), (2, 4, 4, 4)),
    "shared": Case(Shared, (6,)),
    "two paths to one layer": Case(TwoPaths, (6,)),
    "one gamma and beta": Case(TwoStatistics, (6,)),
    "branches": Case(Branches, (6,)),
    "not affine": Case(lambda: _dense(affine=False), (6,)),
    "no running statistics": Case(lambda: _dense(track_running_stats=False), (6,)),
    "momentum None": Case(lambda: _dense(momentum=None), (6,)),
    "shared, momentum None": Case(lambda: _without_momentum(Shared()), (6,)),
    "mean 1e3 spreads": Case(_offset, (6,), offset=1e3),
}


def network(case: str) -> nn.Module:
    """The case's network in float64; every call returns equal values."""
    torch.manual_seed(1)
    module = CASES[case].build().double()
    module(torch.randn(4, *CASES[case].shape, dtype=torch.float64))  # lazy layers take their size
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.uniform_(layer.bias, -0.5, 0.5)
    return module


def batches(case: str, clients: int) -> list[tuple[Tensor, Tensor]]:
    """A batch for each client; sizes, means and spreads differ."""
    batches = []
    for client in range(clients):
        generator = torch.Generator().manual_seed(100 + client)
        size = (5, 8, 3, 6)[client]
        x = torch.randn(size, *CASES[case].shape, dtype=torch.float64, generator=generator)
        x = x * (1 + 0.3 * client) + 0.5 * client + CASES[case].offset
        batches.append((x, torch.randint(0, 3, (size,), generator=generator)))
    return batches


def weights(clients: int) -> list[float]:
    """Unequal weights that sum to 1."""
    values = [0.3, 1.1, 0.7, 1.9][:clients]
    return [value / sum(values) for value in values]


def with_dropout(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The mlp with dropout after its hidden layers."""
    layers: list[nn.Module] = []
    for layer in small_networks.mlp(math.prod(shape), classes).children():
        layers += [layer, nn.Dropout(0.3)] if isinstance(layer, nn.ReLU) else [layer]
    return nn.Sequential(*layers)


def frozen(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The mlp with a first layer that is not trained."""
    network = small_networks.mlp(math.prod(shape), classes)
    network.get_submodule("1").requires_grad_(False)
    return network


def unused(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The mlp with a layer that ``forward`` does not use."""
    network = small_networks.mlp(math.prod(shape), classes)
    network.get_submodule("3").register_module("aside", nn.Linear(2, 2))
    return network


def cumulative(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The mlp with running statistics that are plain means over all batches."""
    return _without_momentum(small_networks.mlp(math.prod(shape), classes))


class Counting(nn.Module):
    """The mlp with two more buffers, one of an integer and one of a floating-point type."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.network = small_networks.mlp(features, classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(()))
        self.calls: Tensor
        self.largest: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.largest.copy_(torch.maximum(self.largest, x.detach().amax()))
        return self.network(x)  # type: ignore[no-any-return]


def counting(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Counting(math.prod(shape), classes)


def spectral(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The mlp with torch's spectral normalization of a layer, which has vectors as buffers."""
    network = small_networks.mlp(math.prod(shape), classes)
    nn.utils.parametrizations.spectral_norm(network.get_submodule("4"))
    return network


class Drawing(nn.Module):
    """The mlp, whose training passes draw from Python's and numpy's generators around BN layers."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.layers = small_networks.mlp(features, classes)
        with torch.no_grad():
            shift = 0.1 * float(np.random.randn()) + 0.1 * random.gauss(0, 1)
            self.layers.get_parameter("7.bias").add_(shift)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.children():
            x = layer(x)
            if self.training and isinstance(layer, nn.BatchNorm1d | nn.SyncBatchNorm | nn.ReLU):
                noise = torch.from_numpy(np.random.randn(3)).to(x)  # numpy keeps a fourth one
                x = x * (1 + 0.1 * random.random()) + 0.1 * noise.sum() + 0.1 * random.gauss(0, 1)
        return x


def drawing(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Drawing(math.prod(shape), classes)


class WithAuxiliary(nn.Module):
    """The mlp, which returns its class scores in a dict, among others."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        *body, self.head = small_networks.mlp(features, classes).children()
        self.body = nn.Sequential(*body)
        self.auxiliary = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, classes))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        return {"hidden": hidden, "logits": self.head(hidden), "aux": self.auxiliary(hidden)}


def with_auxiliary(shape: tuple[int, ...], classes: int) -> nn.Module:
    return WithAuxiliary(math.prod(shape), classes)


def two_statistics(shape: tuple[int, ...], classes: int) -> nn.Module:
    """A network with two BN layers that share gamma and beta."""
    first, second = nn.BatchNorm1d(16), nn.BatchNorm1d(16)
    second.weight, second.bias = first.weight, first.bias
    layers = nn.Flatten(), nn.Linear(math.prod(shape), 16), first, nn.ReLU(), nn.Linear(16, 16)
    return nn.Sequential(*layers, second, nn.ReLU(), nn.Linear(16, classes))


def weight_normed(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The mlp with torch's older weight normalization, which computes a weight in each pass."""
    network = small_networks.mlp(math.prod(shape), classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(network.get_submodule("4"))
    return network


def old_spectral(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The mlp with torch's older spectral normalization."""
    network = small_networks.mlp(math.prod(shape), classes)
    nn.utils.spectral_norm(network.get_submodule("4"))
    return network


class Tangled(nn.Module):
    """Layers with two names, the second of which sorts first; a parameter that nothing uses.

    Also a parameter of one layer under two names, a slice, and a buffer outside of state_dicts.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.second, self.bn = nn.Linear(features, features, bias=False), nn.BatchNorm1d(features)
        self.first, self.also_bn = nn.Linear(features, features, bias=False), self.bn
        self.first.weight = self.second.weight
        self.scale = self.other_scale = nn.Parameter(torch.rand(features, 2)[:, 0])
        self.head = nn.Linear(features, classes, bias=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("factor", torch.ones(()), persistent=False)
        self.factor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.second(x.flatten(1)))) * self.scale
        x = torch.relu(self.also_bn(self.first(x))) * self.other_scale * self.factor
        return self.head(x)  # type: ignore[no-any-return]


def tangled(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Tangled(math.prod(shape), classes)
