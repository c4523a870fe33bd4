"""Replaces BN layers by group normalization, layer normalization or nothing.  Used by ``job``."""

from math import gcd

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batchnorm.conversion import CONVERTIBLE
from ..config.algorithms import ALGORITHMS
from ..config.enums import NormName
from ..config.errors import ConfigError, format_option_error
from ..config.schema import Config


def with_norm_of(config: Config, module: nn.Module) -> nn.Module:
    """Converts ``module`` to the normalization of ``model.norm``, or else of the algorithm."""
    norm = config.model.norm or ALGORITHMS[config.algorithm.name].norm
    return convert_norm(module, norm, config.algorithm.groups or 2)


def convert_norm(module: nn.Module, norm: NormName, groups: int) -> nn.Module:
    """Replaces every BatchNorm1d/2d/3d and SyncBatchNorm; returns the module or its replacement.

    gn normalises each sample over its pixels and ``groups`` groups of channels (Wu and He 2018); ln
    over all channels, as one group; none removes the layers; bn changes nothing.  gamma and beta
    stay the same parameters, per channel, and eps stays.  A shared layer stays shared.

    Raises ``ConfigError``, and changes nothing, if the channels of a layer are not a multiple of
    ``groups``, or if a layer is another kind of BN, which may do more than normalise.
    """
    if norm is NormName.bn:
        return module
    groups = groups if norm is NormName.gn else 1
    layers = {
        path: layer for path, layer in module.named_modules() if isinstance(layer, _BatchNorm)
    }
    _check_kinds(layers, norm)
    _check_channels(layers, groups)
    new = {layer: _replacement(layer, norm, groups) for layer in layers.values()}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():  # named_children gives each child only once
            if isinstance(child, _BatchNorm):
                setattr(parent, name, new[child])
    return new[module] if isinstance(module, _BatchNorm) else module


def _replacement(layer: _BatchNorm, norm: NormName, groups: int) -> nn.Module:
    if norm is NormName.none:
        return nn.Identity()
    new = nn.GroupNorm(groups, layer.num_features, layer.eps, affine=False)
    new.affine, new.weight, new.bias = layer.affine, layer.weight, layer.bias
    return new.train(layer.training)


def _check_kinds(layers: dict[str, _BatchNorm], norm: NormName) -> None:
    for path, layer in layers.items():
        if type(layer) not in CONVERTIBLE:
            allowed = f"bn, because layer {path or '(root)'} is a {type(layer).__name__}"
            remedy = "use plain BatchNorm1d/2d/3d layers or another algorithm"
            raise ConfigError(format_option_error("model.norm", norm, allowed, remedy))


def _check_channels(layers: dict[str, _BatchNorm], groups: int) -> None:
    common = gcd(*(layer.num_features for layer in layers.values()))
    for path, layer in layers.items():
        if layer.num_features % groups:
            where = f"layer {path or '(root)'} has {layer.num_features}"
            allowed = f"a divisor of the channels of every BN layer, and {where}"
            fitting = max(size for size in range(1, groups) if common % size == 0)
            remedy = f"try algorithm.groups={fitting}"
            raise ConfigError(format_option_error("algorithm.groups", groups, allowed, remedy))
