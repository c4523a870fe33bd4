"""Ways to a device that do not wait for what it is doing.

A plain copy to a GPU waits until it has done all that was asked of it before, so that it then idles
until the next work arrives.
"""

from __future__ import annotations

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
        return send(torch.tensor(numbers, dtype=dtype), device)
