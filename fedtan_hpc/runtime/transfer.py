"""Ways to a device that do not wait for what it is doing, and in few launches.

A plain copy to a GPU waits until it has done all that was asked of it before, so that it then idles
until the next work arrives.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, of the CPU, on ``device``."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=8192)
def constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The ``numbers`` as a tensor that nobody may change: it is the same one every time."""
    with torch.inference_mode(False):
        return send(torch.tensor(numbers, dtype=dtype, device="cpu"), device)


@torch.no_grad()
def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy each source into its target; on a GPU tensors that lie alike go in one launch."""
    alike: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        key = target.dtype, target.stride() == source.stride()
        into, out_of = alike.setdefault(key, ([], []))
        into.append(target)
        out_of.append(source)
    for into, out_of in alike.values():
        torch._foreach_copy_(into, out_of)
