"""How far gradients are from the global gradient: relative distances and cosines, by tensor."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_NOISE = 32
"""Times the rounding error of the whole gradient: the norm below which a gradient is taken for 0,
such as that of a bias in front of BN."""


class Deviation(NamedTuple):
    """The deviation of a tensor, or of all; None where the global gradient is 0 to rounding."""

    relative: float | None
    """||h - g|| / ||g||"""
    cosine: float | None
    """Of the angle between h and g; None also if h is 0 or not finite."""


def norms(gradients: Sequence[Tensor]) -> list[float]:
    """Returns the norm of each tensor, computed in float64."""
    return [float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in gradients]


def deviations(found: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Deviation]:
    """Returns the deviation of each tensor of ``found``, and at the end that of all together."""
    lengths, others = norms(reference), norms(found)
    apart = norms([a.double() - b.double() for a, b in zip(found, reference, strict=True)])
    products = [
        float((a.double() * b.double()).sum()) for a, b in zip(found, reference, strict=True)
    ]
    whole = math.hypot(*lengths)
    least = _NOISE * torch.finfo(reference[0].dtype).eps * whole if reference else 0.0
    each = [
        _deviation(*figures, least)
        for figures in zip(apart, lengths, others, products, strict=True)
    ]
    together = math.hypot(*apart), whole, math.hypot(*others), math.fsum(products)
    return [*each, _deviation(*together, least)]


def _deviation(
    apart: float, length: float, other: float, product: float, least: float
) -> Deviation:
    if not length > least:
        return Deviation(None, None)
    cosine = product / (length * other) if other > least else math.nan
    bounded = max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else None
    relative = apart / length
    return Deviation(relative if math.isfinite(relative) else None, bounded)
