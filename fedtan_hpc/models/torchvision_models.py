"""torchvision's classifiers, adapted to the data's channels and optionally to small images.

Used by ``factory``.
"""

import warnings
from difflib import get_close_matches

import torch
from torch import nn

from ..config.errors import ConfigError, format_option_error
from ..runtime.torchvision_import import import_torchvision

_LARGE_KERNEL = 7
"""Pixels; a first convolution of this size or larger is meant for large images."""


def build(name: str, small_input: bool, channels: int, classes: int) -> nn.Module:
    """Returns torchvision's classifier ``name``, with its own initialization, for ``channels``.

    With ``small_input`` the stem keeps the image's size: the first convolution has no stride and,
    if it was 7x7 or larger, is 3x3; no pooling comes before the second convolution.

    Raises ``ConfigError`` for a name that torchvision does not have, and for ``small_input`` with a
    network whose first convolution has no stride.
    """
    with torch.device("cpu"):  # the import makes tensors, which must not be on meta
        models = import_torchvision().models
    names = models.list_models(module=models)
    if name not in names:
        near = get_close_matches(name, names, n=3)
        remedy = f"did you mean {' or '.join(near)}?" if near else "try model.name=resnet18"
        allowed = f"one of torchvision's {len(names)} classifiers"
        raise ConfigError(format_option_error("model.name", name, allowed, remedy))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about changed defaults that are not used here
        module: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    if small_input:
        _keep_size(module, name)
    path, first = _first_convolution(module)
    if first.in_channels != channels:
        module.set_submodule(path, _like(first, channels))
    return module


def _keep_size(module: nn.Module, name: str) -> None:
    """Removes the stride of the first convolution, and the pooling between it and the second."""
    path, first = _first_convolution(module)
    if first.stride == (1, 1):
        allowed = f"false with model.name={name}, whose first convolution has no stride"
        raise ConfigError(format_option_error("model.small_input", "true", allowed, "leave it out"))
    if pool := _stem_pool(module):
        module.set_submodule(pool, nn.Identity())
    if max(first.kernel_size) >= _LARGE_KERNEL:
        module.set_submodule(path, _like(first, first.in_channels, kernel=3))
    else:
        first.stride = (1, 1)


def _first_convolution(module: nn.Module) -> tuple[str, nn.Conv2d]:
    layers = module.named_modules()
    return next((path, layer) for path, layer in layers if isinstance(layer, nn.Conv2d))


def _stem_pool(module: nn.Module) -> str | None:
    """Returns the path of the max-pooling between the first two convolutions, if there is one."""
    convolutions = 0
    for path, layer in module.named_modules():
        convolutions += isinstance(layer, nn.Conv2d)
        if convolutions == 1 and isinstance(layer, nn.MaxPool2d):
            return str(path)
    return None


def _like(first: nn.Conv2d, channels: int, kernel: int | None = None) -> nn.Conv2d:
    """Returns a convolution like ``first`` for ``channels``; with ``kernel`` it keeps the size.

    It draws weights like torchvision's ResNets, by fan-out, and has biases of 0.
    """
    new = nn.Conv2d(
        channels,
        first.out_channels,
        kernel or first.kernel_size,  # type: ignore[arg-type]
        1 if kernel else first.stride,  # type: ignore[arg-type]
        padding=kernel // 2 if kernel else first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    return new
