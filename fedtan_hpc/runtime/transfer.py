"""Copies to a device that do not wait for its earlier work, and that take few kernel launches.

A plain copy to a GPU waits until the GPU has finished all earlier work; the GPU then idles until
the host sends more.
"""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to ``device``; to a GPU without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=8192)
def constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a cached 1-d tensor of ``numbers``; all callers share it and must not change it."""
    with torch.inference_mode(False):
        return send(torch.tensor(numbers, dtype=dtype, device="cpu"), device)


@torch.no_grad()
def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copies each source into its target; tensors of equal dtype and strides go in one launch."""
    batches: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        key = target.dtype, target.stride() == source.stride()
        batch_targets, batch_sources = batches.setdefault(key, ([], []))
        batch_targets.append(target)
        batch_sources.append(source)
    for batch_targets, batch_sources in batches.values():
        torch._foreach_copy_(batch_targets, batch_sources)
