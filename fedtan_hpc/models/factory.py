"""Makes networks: built-in ones and torchvision's by name, others by import.  Used by ``job``."""

from collections.abc import Callable
from math import prod
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ..config.enums import GammaName, ModelName, ModelSource
from ..config.schema import ModelConfig
from ..runtime import global_random
from . import import_target, torchvision_models
from .resnet import resnet20, resnet32, resnet56
from .small_networks import cnn, mlp, vgg11_bn
from .unet import UNet

_BUILDERS: dict[ModelName, Callable[[int, int], nn.Module]] = {
    ModelName.mlp: mlp,
    ModelName.cnn: cnn,
    ModelName.resnet20: resnet20,
    ModelName.resnet32: resnet32,
    ModelName.resnet56: resnet56,
    ModelName.vgg11_bn: vgg11_bn,
    ModelName.unet: UNet,
}
"""Built-in networks, called with input channels (mlp: input features) and classes."""


def build(config: ModelConfig, shape: Any, classes: int, seed: int) -> nn.Module:
    """Makes the network for samples of ``shape``, such as (C, H, W), with its source's BN layers.

    Initial weights depend on ``seed`` alone; the random state of the process stays unchanged.

    Raises ``ConfigError`` if options of the network are wrong.
    """
    with global_random.preserved():
        global_random.seed(seed)
        if config.source is ModelSource.torchvision:
            small = config.small_input
            module = torchvision_models.build(config.name, small, shape[0], classes)
        elif config.source is ModelSource.import_:
            module = import_target.build(config.target or "", shape, classes)
        else:
            name = ModelName(config.name)
            inputs = prod(shape) if name is ModelName.mlp else shape[0]
            module = _BUILDERS[name](inputs, classes)
            _initialise(module)
        if config.gamma is GammaName.uniform:
            _draw_scales(module)
    return module


def _initialise(module: nn.Module) -> None:
    """Draws Kaiming-normal weights (He et al. 2015) and sets biases to 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _draw_scales(module: nn.Module) -> None:
    """Draws gamma of normalization layers from U(0, 1), with beta 0; skips lazy layers."""
    for layer in module.modules():
        if isinstance(layer, _NormBase | nn.GroupNorm | nn.LayerNorm) and layer.weight is not None:
            if not is_lazy(layer.weight):
                nn.init.uniform_(layer.weight)
            if layer.bias is not None and not is_lazy(layer.bias):
                nn.init.zeros_(layer.bias)


def parameter_count(module: nn.Module) -> int:
    """Returns the number of trainable values."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
