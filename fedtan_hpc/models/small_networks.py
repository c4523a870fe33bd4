"""Small networks of this package: mlp, cnn and vgg11_bn."""

from __future__ import annotations

from torch import nn


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
        layers += _convolution(widths[stage], widths[stage + 1], stride)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def vgg11_bn(in_channels: int, classes: int) -> nn.Module:
    """VGG-A (Simonyan and Zisserman 2015) for small images: BN, and one linear layer at the end.

    Each of the five stages halves the image, rounding up, so that one of any size passes.
    """
    layers: list[nn.Module] = []
    width = in_channels
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for wider in stage:
            layers += _convolution(width, wider)
            width = wider
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def _convolution(width: int, wider: int, stride: int = 1) -> list[nn.Module]:
    """3x3, BN and rectifier."""
    convolution = nn.Conv2d(width, wider, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(wider), nn.ReLU()]
