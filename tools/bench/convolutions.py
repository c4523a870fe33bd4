"""The convolutions of a network's local steps alone: a lower bound for every way to train it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedtan_hpc.config.schema import Config
from fedtan_hpc.job.setup import network


def round_of(config: Config, device: torch.device) -> Callable[[], object] | None:
    """Returns a function that runs all convolutions of a round, or None if the network has none.

    It runs the forward and backward pass of every convolution, on random tensors of the right
    shapes, once for each local step.  There is no autograd, no other layer and no SGD step.
    """
    info = config.data.info()
    model = network(config, info.shape, info.classes).to(device).train()
    order = torch.channels_last if config.channels_last else torch.contiguous_format
    images = torch.randn(config.batch_size, *info.shape, device=device)
    calls: list[Callable[[], None]] = []

    def add_call(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = torch.randn_like(inputs[0]).contiguous(memory_format=order)
        gradient = torch.randn_like(output).contiguous(memory_format=order)
        calls.append(_convolution(layer, x, gradient, is_first=not calls))

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    hooks = [layer.register_forward_hook(add_call) for layer in layers]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        for call in calls * config.local_steps:
            call()

    return run if calls else None


def _convolution(
    layer: nn.Conv2d, x: Tensor, gradient: Tensor, is_first: bool
) -> Callable[[], None]:
    """Returns a call of forward and backward; the images of the first layer get no gradient."""
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    geometry = layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups
    wanted = [not is_first, True, bias is not None]
    bias_sizes = None if bias is None else [len(bias)]

    def call() -> None:
        torch.ops.aten.convolution(x, weight, bias, *geometry)
        torch.ops.aten.convolution_backward(gradient, x, weight, bias_sizes, *geometry, wanted)

    return call
