"""Numbers as two float64 halves, for sums whose differences need more than 53 bits.

High has 24 bits, as wide as float32, so that products of two, and sums of such products, stay
exact; low is the rest.
"""

from __future__ import annotations

import struct
from typing import TypeAlias

import torch
from torch import Tensor

Halves: TypeAlias = tuple[Tensor, Tensor]


def split_number(value: float) -> tuple[float, float]:
    """``split`` of a number."""
    [high] = struct.unpack("f", struct.pack("f", value))
    return high, value - high


def split(value: Tensor, low: Tensor | None = None) -> Halves:
    """``value + low`` (float64) in halves."""
    high = value.float().double()
    rest = value - high
    return high, rest if low is None else rest + low


def multiply(a: tuple[Tensor | float, Tensor | float], b: Halves) -> Halves:
    """The product in halves; only the products with low halves are rounded, at their scale."""
    high, rest = split(b[0] * a[0])
    return high, rest + (b[1] * a[0] + (b[0] + b[1]) * a[1])


def square(a: Halves) -> Halves:
    """The same of ``a`` with itself."""
    high, rest = split(a[0].square())
    return high, torch.addcmul(rest, a[1], torch.add(a[1], a[0], alpha=2))
