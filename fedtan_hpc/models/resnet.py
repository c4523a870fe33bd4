"""ResNets for small images (He et al. 2016, section 4.2), with shortcuts of option A."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def resnet20(in_channels: int, classes: int) -> nn.Module:
    """19 BN layers of 688 channels in all; 269,722 parameters for 3 channels and 10 classes."""
    return ResNet(blocks_per_stage=3, in_channels=in_channels, classes=classes)


def resnet32(in_channels: int, classes: int) -> nn.Module:
    """31 BN layers of 1,136 channels in all; 464,154 parameters for 3 channels and 10 classes."""
    return ResNet(blocks_per_stage=5, in_channels=in_channels, classes=classes)


def resnet56(in_channels: int, classes: int) -> nn.Module:
    """55 BN layers of 2,032 channels in all; 853,018 parameters for 3 channels and 10 classes."""
    return ResNet(blocks_per_stage=9, in_channels=in_channels, classes=classes)


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
