"""A single client: its layers inside the context, and after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedtan_hpc import convert_batchnorm, federated_statistics
from tests.batchnorm.layers import Values, gradients, randn
from tests.helpers import networks, pooled, ranks


def network_gradients(module: nn.Module, case: str) -> Values:
    x, y = networks.batches(case, 1)[0]
    cross_entropy(module(x), y).backward()
    return gradients(module)


@pytest.mark.parametrize("case", networks.CASES)
def test_one_client_alone_is_local_batchnorm(case: str) -> None:
    expected = network_gradients(networks.network(case), case)
    module = convert_batchnorm(networks.network(case))
    with federated_statistics(module, weight=1.0):
        measured = network_gradients(module, case)
    assert pooled.worst_relative_error(measured, expected) < 1e-12


@pytest.mark.parametrize("weight", [0.5, 0.0, -1.0, 2.0, float("nan")])
def test_one_client_alone_has_weight_1(weight: float) -> None:
    module = convert_batchnorm(networks.network("shared"))
    with federated_statistics(module, weight), pytest.raises(ValueError, match="layer bn"):
        module(networks.batches("shared", 1)[0][0])


def test_an_unconverted_layer_is_refused_by_name() -> None:
    module = nn.Sequential(convert_batchnorm(nn.BatchNorm1d(3)), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="layer 1 is local"), federated_statistics(module, 1.0):
        pass
    assert is_local(module[0])


def is_local(layer: nn.Module) -> bool:
    """Whether ``layer`` agrees with torch's BN; in a context of weight 0.5 it would raise."""
    x = randn(6, 3).float()
    return torch.equal(layer(x), nn.BatchNorm1d(3)(x))


def test_after_the_context_the_layer_is_local_again() -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    with federated_statistics(layer, weight=0.5):
        assert raises_value_error(layer)
    assert is_local(layer)


def test_after_an_exception_the_layer_is_local_again() -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    with pytest.raises(KeyError), federated_statistics(layer, weight=0.5):
        raise KeyError
    assert is_local(layer)


def raises_value_error(layer: nn.Module) -> bool:
    try:
        layer(torch.randn(6, 3))
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("fails", [False, True])
def test_an_inner_context_gives_the_outer_one_back(fails: bool) -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    with federated_statistics(layer, weight=0.5):
        try:
            with federated_statistics(layer, weight=1.0):
                layer(torch.randn(6, 3))
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert raises_value_error(layer)
    assert is_local(layer)


def test_the_backward_pass_may_follow_the_context() -> None:
    expected = network_gradients(networks.network("1d"), "1d")
    module = convert_batchnorm(networks.network("1d"))
    x, y = networks.batches("1d", 1)[0]
    with federated_statistics(module, weight=1.0):
        loss = cross_entropy(module(x), y)
    loss.backward()
    assert pooled.worst_relative_error(gradients(module), expected) < 1e-12


class NoGradient(torch.autograd.Function):
    """The identity, through which nothing flows back, not even zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        return None


def test_an_undefined_gradient_counts_as_zero() -> None:
    x = randn(6, 3).requires_grad_()
    layer = convert_batchnorm(nn.BatchNorm1d(3).double())
    with federated_statistics(layer, weight=1.0):
        NoGradient.apply(layer(x)).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is None or x.grad.count_nonzero() == 0


def test_a_copy_made_inside_the_context_is_outside_it() -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    with federated_statistics(layer, weight=0.5):
        twin = copy.deepcopy(layer)
    assert is_local(twin)


def many_calls() -> int:
    layer = convert_batchnorm(nn.BatchNorm1d(2))
    with federated_statistics(layer, 0.5):
        for _ in range(600):
            layer(torch.randn(3, 2))
    return int(layer.get_buffer("num_batches_tracked"))


def test_a_context_may_stay_open_for_long() -> None:
    assert ranks.on_ranks(2, many_calls) == [600, 600]
