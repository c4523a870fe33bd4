"""What a rank puts into a collective, and the reading of the sum.

Every message of the statistics begins with a header of small integers, so that the sum itself
tells whether the ranks belong together: the layer's tag t (layer, call, direction) as t and t^2,
for sum t^2 = (sum t)^2 / ranks only if all t are equal; and counts of bad weights and of empty
batches.  All is float64, in which those integers are exact.

The sums are mu = sum p m and s = sum p (v + m^2), and the variance is s - mu^2, which loses
(mean / spread)^2 of 2^53 where a channel's mean is large against its spread.  Values of 24 bits
have lost as much to their own rounding, (mean / spread)^2 / 12 of 2^48; float64 values have not,
and their sums are carried as two halves each (``halves``).

Shapes: K clients of one message, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..runtime import transfer
from . import halves

WEIGHT_TOLERANCE = 1e-6
"""How far from 1 the weights' sum may be."""

HEADER = 7
"""Numbers before those of the channels; on the way back there are two."""

_MIXED = (
    "another rank sent the statistics of another layer: all ranks must run the same layers in the "
    "same order, all eagerly or all compiled"
)


@dataclass(frozen=True)
class ClientWeights:
    """What the clients of one message contribute: weights p_k, and n_k values per channel."""

    weights: Sequence[float]
    counts: Sequence[int]

    @cached_property
    def bad_weights(self) -> int:
        """How many are negative or not finite."""
        return sum(not _is_valid(weight) for weight in self.weights)

    @cached_property
    def empty_batches(self) -> int:
        """How many clients count, and yet bring nothing."""
        return sum(
            _is_valid(weight) and weight > 0 and count == 0
            for weight, count in zip(self.weights, self.counts, strict=True)
        )

    @cached_property
    def taking_part(self) -> list[bool]:
        """A valid weight above 0 and a batch that is not empty."""
        return [
            _is_valid(weight) and weight > 0 and count > 0
            for weight, count in zip(self.weights, self.counts, strict=True)
        ]

    @cached_property
    def counted_weights(self) -> list[float]:
        """p_k, or 0 for a client that does not take part."""
        return [p if part else 0.0 for p, part in zip(self.weights, self.taking_part, strict=True)]

    @cached_property
    def weights_in_halves(self) -> Sequence[Sequence[float]]:
        """The counted weights' high halves, and the low ones."""
        return list(zip(*map(halves.split_number, self.counted_weights), strict=True))

    @cached_property
    def header(self) -> list[float]:
        """What stands behind the tag: bad weights, empty batches, values, the weights' halves.

        The values per channel are those of the clients that take part.
        """
        values = sum(n for n, part in zip(self.counts, self.taking_part, strict=True) if part)
        return [self.bad_weights, self.empty_batches, values, *map(sum, self.weights_in_halves)]


def _is_valid(weight: float) -> bool:
    return math.isfinite(weight) and weight >= 0


@dataclass(frozen=True)
class GlobalMoments:
    """Mean and biased variance over all ranks, float64, and the values behind them."""

    mean_C: Tensor
    variance_C: Tensor
    count: float | Tensor
    """Values per channel on all ranks whose weight is not 0; on a GPU float64, 0-d."""


def pack_moments(tag: int, shares: ClientWeights, mean_KC: Tensor, variance_KC: Tensor) -> Tensor:
    """The forward message, float64: header, then sum p m and sum p (v + m^2).

    (7 + 2C,), or of float64 moments (7 + 4C,), in halves.  ``mean_KC`` and ``variance_KC`` (biased)
    are the clients' own; a client that does not take part adds zeros whatever they are.
    """
    clients = len(shares.weights)
    mean, variance = mean_KC.reshape(clients, -1), variance_KC.reshape(clients, -1)
    sums = _sums_in_halves if mean.dtype is torch.float64 else _sums
    bodies = _over_clients(sums(shares, mean, variance), shares)
    header = _numbers((tag, tag * tag, *shares.header), bodies)
    return torch.cat([header, bodies.flatten()])


def _sums(shares: ClientWeights, mean_KC: Tensor, variance_KC: Tensor) -> Tensor:
    """Each client's p m and p (v + m^2), (2, K, C) float64."""
    first, second = mean_KC.double(), variance_KC.double()
    both = torch.stack([first, second.addcmul_(first, first)])
    return both.mul_(_factors(shares.counted_weights, both))


def _sums_in_halves(shares: ClientWeights, mean_KC: Tensor, variance_KC: Tensor) -> Tensor:
    """The same in halves, (4, K, C)."""
    mean = halves.split(mean_KC)
    highs, lows = shares.weights_in_halves
    p = _factors(highs, mean_KC), _factors(lows, mean_KC)
    square_high, square_low = halves.square(mean)
    first = halves.multiply(p, mean)
    second = halves.multiply(p, (square_high, square_low + variance_KC))
    return torch.stack([*first, *second])


def unpack_moments(message: Tensor, channels: int) -> GlobalMoments:
    """Global mean sum p m and variance sum p (v + (m - mean)^2) from the summed message."""
    header, body = message[:HEADER], message[HEADER:]
    count, high, low = _values(header)[4:]
    if len(body) == 4 * channels:
        mean, variance = _moments_from_halves(header, body)
    else:
        mean, second = (body / (high + low)).view(2, -1).unbind()
        variance = torch.addcmul(second, mean, mean, value=-1)
    return GlobalMoments(mean, variance.clamp_min_(0.0), count)


def _values(header: Tensor) -> Sequence[Any]:
    """Plain ones on a CPU, where they are quicker to use; elsewhere reading them would wait."""
    return header.tolist() if header.device.type == "cpu" else header.unbind()


def _moments_from_halves(header: Tensor, body_4C: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance."""
    total = halves.split(header[5], header[6])
    halves_22C = body_4C.view(2, 2, -1)
    high_2C, low_2C = halves.split(halves_22C[:, 0], halves_22C[:, 1])
    first, second = (high_2C[0], low_2C[0]), (high_2C[1], low_2C[1])
    a_high, a_low = halves.multiply(total, second)
    b_high, b_low = halves.square(first)
    weights = header[5] + header[6]
    difference = (a_high - b_high) + (a_low - b_low)
    return (first[0] + first[1]) / weights, difference / weights.square()


def pack_derivatives(tag: int, shares: ClientWeights, sums_K2C: Tensor) -> Tensor:
    """The backward message: tag, then p times the two sums per channel; (2 + 2C,) float64."""
    sums = sums_K2C.reshape(len(shares.weights), -1).double()
    weighted = sums * _factors(shares.counted_weights, sums)
    return torch.cat([_numbers((tag, tag * tag), sums), _over_clients(weighted, shares)])


def _factors(numbers: Sequence[float], like: Tensor) -> Tensor | float:
    """One for each client: (K, 1), or a number, which is quicker to multiply by."""
    return numbers[0] if len(numbers) == 1 else _numbers(tuple(numbers), like).unsqueeze(1)


def _numbers(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return transfer.constant(numbers, like.dtype, like.device)


def _over_clients(values: Tensor, shares: ClientWeights) -> Tensor:
    """Sums (..., C) of (..., K, C) over the clients that take part."""
    if not all(shares.taking_part):  # zeros, whatever they are
        absent = tuple(not part for part in shares.taking_part)
        out = transfer.constant(absent, torch.bool, values.device)
        values = values.masked_fill(out.unsqueeze(1), 0.0)
    return values.squeeze(-2) if len(shares.weights) == 1 else values.sum(-2)


def unpack_derivatives(message: Tensor) -> Tensor:
    """The summed derivatives, (2C,) float64."""
    return message[2:]


def merge(parts: Sequence[Tensor]) -> Tensor:
    """The messages of one rank's clients, of one layer, as the message of that rank."""
    first = parts[0]
    if any(part.shape != first.shape or part[0] != first[0] for part in parts):
        raise RuntimeError(_MIXED)
    total = torch.stack(list(parts)).sum(0)
    total[:2] = first[:2]  # the tag stays one rank's
    return total


def check_moments(message: Tensor, tag: int, ranks: int) -> None:
    """Raise what a summed forward message shows to be wrong; it shows the same to every rank.

    ``ValueError`` for weights and batches, ``RuntimeError`` for ranks at different layers.
    """
    tags, squares, bad_weights, empty_batches, count, high, low = message[:HEADER].tolist()
    _check_tags(tags, squares, tag, ranks)
    if bad_weights:
        raise ValueError(f"{bad_weights:.0f} weights on {ranks} ranks are negative or not finite")
    if empty_batches:
        raise ValueError(f"{empty_batches:.0f} batches are empty, with a weight above 0")
    if not abs(high + low - 1) <= WEIGHT_TOLERANCE:  # true for nan too
        raise ValueError(f"the weights sum to {high + low:.9g} over {ranks} ranks, not to 1")
    if count < 2:
        raise ValueError("one value per channel on all ranks together; a variance needs two")


def check_derivatives(message: Tensor, tag: int, ranks: int) -> None:
    """Raise ``RuntimeError`` if a summed backward message mixes layers."""
    tags, squares = message[:2].tolist()
    _check_tags(tags, squares, tag, ranks)


def _check_tags(tags: float, squares: float, tag: int, ranks: int) -> None:
    if tags != ranks * tag or squares != ranks * tag * tag:
        raise RuntimeError(_MIXED)
