"""The networks, by name, each with batch normalization after its hidden layers."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig, ModelName


def build(config: ModelConfig, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """The network for samples of ``shape`` (C, H, W), on the CPU in float32.

    Initial weights depend on ``seed`` alone; the process's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _BUILDERS[config.name](shape, classes)
        _initialise(module)
    return module


def mlp(features: int, classes: int) -> nn.Module:
    """Fully connected, 128 and 64 hidden units."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(features, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def cnn(in_channels: int, classes: int) -> nn.Module:
    """Three 3x3 convolutions of 16, 32 and 64 channels, each halving the image after the first."""
    widths = (in_channels, 16, 32, 64)
    layers: list[nn.Module] = []
    for stage in range(3):
        stride = 1 if stage == 0 else 2
        layers += [
            nn.Conv2d(widths[stage], widths[stage + 1], 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(widths[stage + 1]),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def resnet20(in_channels: int, classes: int) -> nn.Module:
    """ResNet-20 for small images (He et al. 2016, section 4.2) with option A shortcuts.

    19 BN layers of 688 channels in all; 269,722 parameters for 3 channels and 10 classes.
    """
    return ResNet(blocks_per_stage=3, in_channels=in_channels, classes=classes)


class ResNet(nn.Module):
    """Stem, three stages of 16, 32 and 64 channels, mean over the image, one linear layer."""

    def __init__(self, blocks_per_stage: int, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks = []
        width = 16
        for stage, wider in enumerate((16, 32, 64)):
            for position in range(blocks_per_stage):
                stride = 2 if stage > 0 and position == 0 else 1
                blocks.append(Block(width, wider, stride))
                width = wider
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(width, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Class scores, (N, classes)."""
        x = torch.relu(self.bn(self.conv(x_NCHW)))
        return self.linear(self.blocks(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, width: int, wider: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, wider, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wider)
        self.stride, self.missing = stride, wider - width

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) to (N, wider, H / stride, W / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        """Option A: every second pixel, and channels of zeros on both sides."""
        if self.stride == 1 and self.missing == 0:
            return x
        x = x[:, :, :: self.stride, :: self.stride]
        before = self.missing // 2
        return F.pad(x, (0, 0, 0, 0, before, self.missing - before))


_BUILDERS: dict[ModelName, Callable[[tuple[int, ...], int], nn.Module]] = {
    ModelName.mlp: lambda shape, classes: mlp(prod(shape), classes),
    ModelName.cnn: lambda shape, classes: cnn(shape[0], classes),
    ModelName.resnet20: lambda shape, classes: resnet20(shape[0], classes),
}


def _initialise(module: nn.Module) -> None:
    """Kaiming-normal weights (He et al. 2015) for rectifiers, biases 0; BN starts as identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def parameter_count(module: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in module.parameters())
