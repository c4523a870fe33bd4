"""The convolutions of a network's steps alone: the floor under any way to train it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedtan_hpc.config.schema import Config


def round_of(config: Config, where: Any) -> Callable[[], object] | None:
    """E times the forward and backward pass of every convolution, on tensors of the right shapes.

    There is nothing between them, no autograd and no step of SGD.  None for a network without.
    """
    import torch
    from torch import nn

    from fedtan_hpc.job.setup import network

    facts = config.data.facts()
    model = network(config, facts.shape, facts.classes).to(where).train()
    order = torch.channels_last if config.channels_last else torch.contiguous_format
    images = torch.randn(config.batch_size, *facts.shape, device=where)
    calls: list[Callable[[], None]] = []

    def note(layer: nn.Conv2d, inputs: tuple[Any, ...], output: Any) -> None:
        x = torch.randn_like(inputs[0]).contiguous(memory_format=order)
        slope = torch.randn_like(output).contiguous(memory_format=order)
        calls.append(_convolution(layer, x, slope, is_first=not calls))

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        for call in calls * config.local_steps:
            call()

    return run if calls else None


def _convolution(layer: Any, x: Any, slope: Any, is_first: bool) -> Callable[[], None]:
    """Output and gradients; the first layer's images need none."""
    import torch

    weight, bias = layer.weight.detach(), layer.bias
    how = layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups
    wanted = [not is_first, True, bias is not None]
    sizes = None if bias is None else [len(bias)]

    def call() -> None:
        torch.ops.aten.convolution(x, weight, None if bias is None else bias.detach(), *how)
        torch.ops.aten.convolution_backward(slope, x, weight, sizes, *how, wanted)

    return call
