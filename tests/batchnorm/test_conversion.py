"""Conversion of networks, and converted layers outside of a context: torch's to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedtan_hpc import FedTANBatchNorm, convert_batchnorm, federated_statistics
from tests.batchnorm.layers import Values, assert_same_bits, fill, randn, run_layer
from tests.helpers import networks

SHAPES: dict[type[_BatchNorm], tuple[int, ...]] = {
    nn.BatchNorm1d: (6, 4, 5),
    nn.BatchNorm2d: (5, 4, 3, 3),
    nn.BatchNorm3d: (4, 4, 2, 3, 2),
    nn.SyncBatchNorm: (5, 4, 3, 3),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "eps and momentum": {"eps": 1e-3, "momentum": 0.3},
    "momentum None": {"momentum": None},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "meta device": {"device": "meta"},
}
SETTINGS = ["training", "eps", "momentum", "affine", "track_running_stats", "num_features"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_conversion_keeps_parameters_buffers_and_settings(
    kind: type[_BatchNorm], options: str, training: bool
) -> None:
    layer = kind(4, **OPTIONS[options]).train(training)
    expected = dict(layer.named_parameters()) | dict(layer.named_buffers())
    keys = list(layer.state_dict())
    converted = convert_batchnorm(nn.Sequential(layer))[0]  # type: ignore[index]
    assert isinstance(converted, FedTANBatchNorm)
    assert isinstance(converted, kind)
    found = dict(converted.named_parameters()) | dict(converted.named_buffers())
    assert found.keys() == expected.keys()
    assert all(found[name] is value for name, value in expected.items())
    assert list(converted.state_dict()) == keys
    assert all(getattr(converted, name) == getattr(layer, name) for name in SETTINGS)


def test_a_converted_layer_has_the_dtype_and_device_asked_for() -> None:
    half = convert_batchnorm(nn.BatchNorm1d(3, dtype=torch.bfloat16))
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    absent = convert_batchnorm(nn.BatchNorm1d(3, device="meta"))
    assert {value.device.type for value in absent.state_dict().values()} == {"meta"}


def test_a_module_keeps_its_state_dict_keys_and_parameter_order() -> None:
    module = networks.network("2d")
    names, parameters = list(module.state_dict()), list(module.parameters())
    assert convert_batchnorm(module) is module
    assert list(module.state_dict()) == names
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))


def test_a_layer_in_two_places_stays_one_layer() -> None:
    layer = nn.BatchNorm1d(3)
    module = convert_batchnorm(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}))
    assert isinstance(module.get_submodule("a"), FedTANBatchNorm)
    assert module.get_submodule("a") is module.get_submodule("b.0")


def test_a_root_that_is_a_layer_comes_back_converted() -> None:
    layer = nn.BatchNorm2d(3)
    converted = convert_batchnorm(layer)
    assert isinstance(converted, FedTANBatchNorm)
    assert converted.weight is layer.weight


def test_an_absent_child_is_left_absent() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3))
    module.register_module("nothing", None)
    assert convert_batchnorm(module)._modules["nothing"] is None


def test_hooks_survive_the_conversion() -> None:
    layer, calls = nn.BatchNorm1d(3), list[str]()
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    removable = layer.register_forward_hook(lambda *_: calls.append("removed"))
    module = convert_batchnorm(nn.Sequential(nn.Linear(2, 3), layer))
    removable.remove()
    module(torch.randn(4, 2)).sum().backward()
    assert calls == ["pre", "forward", "backward"]


def test_converting_twice_is_converting_once() -> None:
    module = convert_batchnorm(networks.network("shared"))
    before = list(module.modules())
    after = list(convert_batchnorm(module).modules())
    assert all(a is b for a, b in zip(after, before, strict=True))


class OwnBatchNorm(nn.BatchNorm1d):
    """A subclass, which might do anything."""


@pytest.mark.parametrize("layer", [nn.LazyBatchNorm1d(), nn.LazyBatchNorm2d(), OwnBatchNorm(3)])
def test_other_kinds_of_layer_are_refused_by_name(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Sequential(layer))
    with pytest.raises(ValueError, match=rf"layer 1\.0 is a {type(layer).__name__}"):
        convert_batchnorm(module)
    with pytest.raises(ValueError, match=r"layer \(root\)"):
        convert_batchnorm(layer)


def two_uses(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> list[Values]:
    """A use in training and one in evaluation mode."""
    found = []
    for training in (True, False):
        layer.train(training)
        x, g = (randn(*shape, seed=training + seed).to(dtype) for seed in (1, 5))
        found.append(run_layer(layer, x, g))
    return found


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "meta device"])
@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind is not nn.SyncBatchNorm])
def test_outside_the_context_the_layer_is_torchs_to_the_bit(
    kind: type[_BatchNorm], options: str
) -> None:
    original = fill(kind(4, **OPTIONS[options]))
    converted = convert_batchnorm(copy.deepcopy(original))
    dtype = OPTIONS[options].get("dtype", torch.float32)
    expected = two_uses(original, SHAPES[kind], dtype)
    for measured, value in zip(two_uses(converted, SHAPES[kind], dtype), expected, strict=True):
        assert_same_bits(measured, value)


@pytest.mark.parametrize("options", ["defaults", "no running statistics"])
def test_in_evaluation_mode_the_context_changes_no_bit(options: str) -> None:
    original = fill(nn.BatchNorm1d(4, **OPTIONS[options])).eval()
    converted = convert_batchnorm(copy.deepcopy(original))
    x, g = randn(6, 4).float(), randn(6, 4, seed=1).float()
    with federated_statistics(converted, weight=1.0):
        measured = run_layer(converted, x, g)
    assert_same_bits(measured, run_layer(original, x, g))


def test_an_input_of_another_width_is_refused() -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(4))
    with (
        federated_statistics(layer, weight=1.0),
        pytest.raises(ValueError, match="expected 4 channels"),
    ):
        layer(torch.randn(6, 3))


def test_references_outside_the_module_tree_follow_the_conversion() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    alias = module[1]
    assert convert_batchnorm(module)[1] is alias  # type: ignore[index]
    assert isinstance(alias, FedTANBatchNorm)


def test_a_refused_conversion_changes_nothing() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="LazyBatchNorm1d"):
        convert_batchnorm(module)
    assert type(module[0]) is nn.BatchNorm1d


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_torchscript_is_refused() -> None:
    with pytest.raises(ValueError, match="TorchScript"):
        convert_batchnorm(torch.jit.script(nn.Sequential(nn.BatchNorm1d(3))))


def test_a_converted_layer_takes_the_inputs_that_it_took_before() -> None:
    layer = convert_batchnorm(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="4D"):
        layer(torch.randn(4, 3))
