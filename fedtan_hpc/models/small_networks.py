"""Small built-in networks: mlp, cnn and vgg11_bn.  Used by ``factory``."""

from torch import nn


def mlp(features: int, classes: int) -> nn.Module:
    """Returns a fully connected network with 128 and 64 hidden units."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width, out_width in ((features, 128), (128, 64)):
        layers += [nn.Linear(width, out_width), nn.BatchNorm1d(out_width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, classes))


def cnn(in_channels: int, classes: int) -> nn.Module:
    """Returns three 3x3 convolutions of 16, 32 and 64 channels; the last two halve the image."""
    layers = convolution(in_channels, 16) + convolution(16, 32, 2) + convolution(32, 64, 2)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def vgg11_bn(in_channels: int, classes: int) -> nn.Module:
    """Returns VGG-A (Simonyan and Zisserman 2015) with BN and one linear layer, for small images.

    Each of the five stages halves the image and rounds up, so images of any size fit.
    """
    layers: list[nn.Module] = []
    width = in_channels
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for out_width in stage:
            layers += convolution(width, out_width)
            width = out_width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def convolution(width: int, out_width: int, stride: int = 1) -> list[nn.Module]:
    """Returns a 3x3 convolution, BN and ReLU."""
    weights = nn.Conv2d(width, out_width, 3, stride, padding=1, bias=False)
    return [weights, nn.BatchNorm2d(out_width), nn.ReLU()]
