"""Copies of networks that copy.deepcopy refuses, and the layer that cannot be copied."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from fedtan_hpc.models.copies import copied, copy_error
from tests.helpers import networks


@pytest.mark.parametrize("make", [networks.weight_normed, networks.old_spectral])
def test_networks_that_keep_computed_weights_are_copied(make: object) -> None:
    assert callable(make)
    network = make((1, 8, 8), 10)
    x = torch.randn(5, 1, 8, 8)
    network(x).sum().backward()
    copy = copied(network)
    assert copy_error(network) == ""
    first, second = network.state_dict(), copy.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not {id(value) for value in network.parameters()} & {
        id(value) for value in copy.parameters()
    }
    copy.zero_grad()
    torch.testing.assert_close(copy.eval()(x), network.eval()(x))
    copy.train()(x).sum().backward()
    assert copy.get_parameter("4.bias").grad is not None


def test_computed_tensors_in_lists_are_copied_once() -> None:
    network = nn.Linear(2, 2)
    features = network(torch.ones(1, 2))
    network.kept = {"features": [features], "last": (features,)}  # type: ignore[assignment]
    kept = copied(network).kept
    assert isinstance(kept, dict)
    assert kept["features"][0] is kept["last"][0]
    assert torch.equal(kept["last"][0], features)
    assert not kept["last"][0].requires_grad


def test_the_layer_that_cannot_be_copied_is_named() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    network.get_submodule("1.0").lock = threading.Lock()  # type: ignore[assignment]
    error = copy_error(network)
    assert error.startswith("1.0, a ReLU: TypeError: cannot pickle")
