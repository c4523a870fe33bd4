"""ResNets for small images (He et al. 2016, section 4.2), with shortcuts of option A.

Parameter counts are those for 3 input channels and 10 classes.  Used by ``factory``.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


def resnet20(in_channels: int, classes: int) -> nn.Module:
    """Returns ResNet-20: 269,722 parameters, 19 BN layers with 688 channels in all."""
    return ResNet(3, in_channels, classes)


def resnet32(in_channels: int, classes: int) -> nn.Module:
    """Returns ResNet-32: 464,154 parameters, 31 BN layers with 1,136 channels in all."""
    return ResNet(5, in_channels, classes)


def resnet56(in_channels: int, classes: int) -> nn.Module:
    """Returns ResNet-56: 853,018 parameters, 55 BN layers with 2,032 channels in all."""
    return ResNet(9, in_channels, classes)


class ResNet(nn.Module):
    """Stem, three stages of 16, 32 and 64 channels, mean over the image, one linear layer."""

    def __init__(self, blocks_per_stage: int, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks, width = [], 16
        for stage, out_width in enumerate((16, 32, 64)):
            for position in range(blocks_per_stage):
                stride = 2 if stage > 0 and position == 0 else 1
                blocks.append(Block(width, out_width, stride))
                width = out_width
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(width, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Returns class scores, (N, classes)."""
        x = torch.relu(self.bn(self.conv(x_NCHW)))
        return self.linear(self.blocks(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out_width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_width)
        self.stride, self.added_channels = stride, out_width - width

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, width, H, W) to (N, out_width, H / stride, W / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        """Option A: takes every second pixel and adds channels of zeros on both sides."""
        if self.stride == 1 and self.added_channels == 0:
            return x
        x = x[:, :, :: self.stride, :: self.stride]
        before = self.added_channels // 2
        return pad(x, (0, 0, 0, 0, before, self.added_channels - before))
