"""Conversion of BN to other norms: all layers, the formula, equal parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedtan_hpc.config.enums import ModelName, ModelSource, NormName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import ModelConfig
from fedtan_hpc.models import factory
from fedtan_hpc.models.norms import convert_norm

SHAPE = (3, 32, 32)


def build(name: str) -> nn.Module:
    return factory.build(ModelConfig(name=name), SHAPE, 10, seed=0)


def zoo(name: str) -> nn.Module:
    options = ModelConfig(source=ModelSource.torchvision, name=name)
    return factory.build(options, SHAPE, 10, seed=0)


def layers(module: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Returns the paths of the layers of a type."""
    return [path for path, layer in module.named_modules() if isinstance(layer, kind)]


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize(
    ("make", "name", "norm"),
    [
        *((build, name, NormName.ln) for name in ModelName),
        *((zoo, "resnet18", norm) for norm in (NormName.gn, NormName.ln, NormName.none)),
        *((zoo, name, NormName.gn) for name in ("mobilenet_v2", "densenet121", "googlenet")),
    ],
)
def test_all_batchnorm_is_converted(
    make: Callable[[str], nn.Module], name: str, norm: NormName
) -> None:
    with torch.device("meta"):
        module = make(name)
        paths, features = layers(module, _BatchNorm), dict(module.named_parameters())
        module = convert_norm(module, norm, groups=2)
        assert not layers(module, _BatchNorm)
        assert not dict(module.named_buffers())
        kind = nn.Identity if norm is NormName.none else nn.GroupNorm
        assert set(paths) <= set(layers(module, kind))
        if norm is not NormName.none:
            parameters = dict(module.named_parameters())
            assert list(parameters) == list(features)
            assert all(parameters[name] is value for name, value in features.items())
        module(torch.zeros(2, *SHAPE))


def filled(layer: _BatchNorm) -> _BatchNorm:
    """Draws scales and offsets that are neither 0 nor 1."""
    if layer.affine:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, -0.5, 0.5)
    return layer


@pytest.mark.parametrize(("norm", "groups"), [(NormName.ln, 1), (NormName.gn, 3)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (4, 6)),
        (nn.BatchNorm1d, (4, 6, 5)),
        (nn.BatchNorm2d, (4, 6, 3, 2)),
        (nn.BatchNorm3d, (2, 6, 2, 3, 2)),
        (nn.SyncBatchNorm, (4, 6, 3, 2)),
    ],
)
def test_converted_layers_compute_the_formula(
    kind: type[_BatchNorm], shape: tuple[int, ...], affine: bool, norm: NormName, groups: int
) -> None:
    """(x - mean) / sqrt(variance + eps) over a group of one sample, then gamma and beta."""
    layer = filled(kind(6, eps=0.1, affine=affine).double())
    x = torch.randn(shape, dtype=torch.float64)
    grouped = x.reshape(shape[0], groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    expected = ((grouped - mean) / torch.sqrt(variance + 0.1)).reshape(shape)
    if affine:
        of_channel = (1, 6, *[1] * (len(shape) - 2))
        expected = expected * layer.weight.view(of_channel) + layer.bias.view(of_channel)
    converted = convert_norm(layer, norm, groups=3)
    torch.testing.assert_close(converted(x), expected, atol=1e-12, rtol=0)


def test_conversion_to_bn_changes_nothing() -> None:
    module = build("cnn")
    before = list(module.modules())
    assert convert_norm(module, NormName.bn, groups=7) is module
    assert list(module.modules()) == before


def test_a_shared_layer_stays_shared_in_all_its_places() -> None:
    norm = nn.BatchNorm1d(4)
    module = nn.Sequential(norm, nn.Linear(4, 4), norm, nn.Sequential(norm)).eval()
    convert_norm(module, NormName.gn, groups=2)
    inner = module[3]
    assert isinstance(inner, nn.Sequential)
    assert isinstance(module[0], nn.GroupNorm)
    assert module[0] is module[2] is inner[0]
    assert not module[0].training


def test_groups_that_do_not_divide_the_channels_name_the_layer() -> None:
    module = nn.Sequential(nn.BatchNorm1d(12), nn.Sequential(nn.BatchNorm1d(8)))
    before = copy.deepcopy(module)
    with pytest.raises(ConfigError) as caught:
        convert_norm(module, NormName.gn, groups=6)
    assert str(caught.value) == (
        "algorithm.groups=6: allowed is a divisor of the channels of every BN layer, and layer 1.0 "
        "has 8; try algorithm.groups=4"
    )
    assert str(module) == str(before)


def test_a_subclass_of_batchnorm_is_not_converted() -> None:
    class WithMore(nn.BatchNorm1d):
        pass

    with pytest.raises(ConfigError, match=r"layer 0 is a WithMore"):
        convert_norm(nn.Sequential(WithMore(4)), NormName.ln, groups=2)
