"""Running statistics of synchronised uses are those that torch's layers would have."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedtan_hpc import convert_batchnorm, federated_statistics
from fedtan_hpc.config.schema import Config
from fedtan_hpc.data.batching import Samples
from fedtan_hpc.training.local_step import Loss
from fedtan_hpc.training.stacked.vmap_trial import vmap_error
from tests.batchnorm.layers import randn

X = randn(6, 4)


class PartlyFrozen(nn.Module):
    """The second BN layer stays in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh())
        return y

    def train(self, mode: bool = True) -> PartlyFrozen:
        super().train(mode)
        self.second.eval()
        return self


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4)).double()


def norms(model: nn.Module) -> list[nn.BatchNorm1d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d)]


def without_tracking(model: nn.Module) -> None:
    model(X)
    for layer in norms(model):
        layer.track_running_stats = False
    model(X + 1)
    for layer in norms(model):
        layer.track_running_stats = True


def without_momentum(model: nn.Module) -> None:
    model(X)
    for layer in norms(model):
        layer.momentum = 0.0
    model(X + 1)
    for layer in norms(model):
        layer.momentum = 0.1


def with_a_look_between(model: nn.Module) -> None:
    model(X)
    y = model.eval()(X)
    model.train()(y)


def with_shared_buffers(model: nn.Module) -> None:
    first, second = norms(model)
    second.running_mean, second.running_var = first.running_mean, first.running_var
    model(X)
    model(X + 1)


def twice_with_an_average(model: nn.Module) -> None:
    for layer in norms(model):
        layer.momentum = None
    model(X)
    model(X + 1)


USES: list[Callable[[nn.Module], None]] = [
    without_tracking,
    without_momentum,
    with_a_look_between,
    with_shared_buffers,
    twice_with_an_average,
]


def assert_same_buffers(found: nn.Module, expected: nn.Module) -> None:
    pairs = zip(found.named_buffers(), expected.named_buffers(), strict=True)
    for (name, value), (_, right) in pairs:
        torch.testing.assert_close(value, right, msg=name)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_they_move_as_torchs_do(use: Callable[[nn.Module], None]) -> None:
    plain, ours = network(), convert_batchnorm(network())
    use(plain)
    with federated_statistics(ours, 1.0):
        use(ours)
    assert_same_buffers(ours, plain)


def test_those_of_the_use_move_and_not_those_of_the_layer() -> None:
    plain, ours = network(), convert_batchnorm(network())
    expected, found = ({n: b.clone() for n, b in m.named_buffers()} for m in (plain, ours))
    functional_call(plain, expected, (X,))
    with federated_statistics(ours, 1.0):
        functional_call(ours, found, (X,))
    assert_same_buffers(ours, network())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_contexts_may_be_nested() -> None:
    plain, ours = network(), convert_batchnorm(network())
    for shift in (0, 1, 2):
        plain(X + shift)
    with federated_statistics(ours, 1.0):
        ours(X)
        with federated_statistics(ours, 1.0):
            ours(X + 1)
        ours(X + 2)
    assert_same_buffers(ours, plain)


def test_a_compiled_network_may_be_frozen_in_part() -> None:
    torch.compiler.reset()
    plain = PartlyFrozen().double().train()
    ours = convert_batchnorm(copy.deepcopy(plain))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        plain(X)
        with federated_statistics(ours, 1.0):
            compiled(X)
    assert_same_buffers(ours, plain)


def test_a_stacked_network_may_be_frozen_in_part() -> None:
    model = convert_batchnorm(nn.Sequential(PartlyFrozen(), nn.Linear(4, 3))).double().train()
    assert (
        vmap_error(
            model,
            Samples(X[:1], torch.zeros(1, dtype=torch.int64)),
            Config(),
            Loss(),
        )
        is None
    )
