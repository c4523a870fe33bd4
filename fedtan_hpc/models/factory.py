"""The networks: this package's by name, torchvision's by name, anybody's by import."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ..config.enums import GammaName, ModelName, ModelSource
from ..config.schema import ModelConfig
from . import import_target, torchvision_models
from .resnet import resnet20, resnet32, resnet56
from .small_networks import cnn, mlp, vgg11_bn


def build(config: ModelConfig, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """The network for samples of ``shape`` (C, H, W), as its source makes it, with BN.

    Initial weights depend on ``seed`` alone; the process's random state is left as it was.

    Raises ``ConfigError`` if options of the network are wrong.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = _from_source(config, shape, classes)
        if config.gamma is GammaName.uniform:
            _draw_scales(module)
    return module


def _from_source(config: ModelConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    if config.source is ModelSource.torchvision:
        return torchvision_models.build(config.name, config.small_input, shape[0], classes)
    if config.source is ModelSource.target:
        return import_target.build(config.target or "", shape, classes)
    module = _BUILDERS[ModelName(config.name)](shape, classes)
    _initialise(module)
    return module


_BUILDERS: dict[ModelName, Callable[[tuple[int, ...], int], nn.Module]] = {
    ModelName.mlp: lambda shape, classes: mlp(prod(shape), classes),
    ModelName.cnn: lambda shape, classes: cnn(shape[0], classes),
    ModelName.resnet20: lambda shape, classes: resnet20(shape[0], classes),
    ModelName.resnet32: lambda shape, classes: resnet32(shape[0], classes),
    ModelName.resnet56: lambda shape, classes: resnet56(shape[0], classes),
    ModelName.vgg11_bn: lambda shape, classes: vgg11_bn(shape[0], classes),
}


def _initialise(module: nn.Module) -> None:
    """Kaiming-normal weights (He et al. 2015) for rectifiers, biases 0; BN starts as identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _draw_scales(module: nn.Module) -> None:
    """gamma of every normalization layer from U(0, 1), beta 0; lazy layers are left."""
    for layer in module.modules():
        if isinstance(layer, _NormBase | nn.GroupNorm | nn.LayerNorm) and layer.weight is not None:
            if not is_lazy(layer.weight):
                nn.init.uniform_(layer.weight)
            if layer.bias is not None and not is_lazy(layer.bias):
                nn.init.zeros_(layer.bias)


def parameter_count(module: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
