"""Messages of BN statistics: what a rank sends, and what the header of the sum tells.

A message is float64: a header [t, t^2, n, P], then the values of the channels.

- The tag t stands for the model, the layer, its use and the exchange.  The sum over R ranks of t^2
  is (sum of t)^2 / R only if all ranks send one t.
- n is the number of values per channel, and P the sum of p_k, of the clients that take part: those
  with a weight above 0.  A weight that is negative or not finite makes P NaN; an empty batch of a
  client with a weight above 0 makes n infinite.

All ranks read the same sum, and so all raise the same error.  ``statistics_call`` packs and checks
messages, ``context`` merges them; the kernels hand over ``Derivatives``.

Shapes: K clients that this rank stacks (1 if it does not), C channels, D values of a message.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import different_calls
from ..runtime.transfer import constant

WEIGHT_TOLERANCE = 1e-6
"""How far the sum of all weights may be from 1."""
HEADER = 4
"""Numbers of a message before the values of the channels."""
TAGS = 1_048_573
"""Number of tags, a prime; the sum of their squares is exact in float64 on up to 8192 ranks."""


class Derivatives(NamedTuple):
    """Each client's two sums of the backward pass, and their factor, (K, C) each."""

    of_gradient: Tensor
    """sum g"""
    of_product: Tensor
    """sum g xhat"""
    factor: Tensor | None
    """gamma r; None if both sums have it already."""

    def scale(self, values_KD: Tensor) -> None:
        """Multiplies both sums, side by side in ``values_KD``, by the factor, in place."""
        if self.factor is not None:
            clients, channels = self.factor.shape
            values_KD.view(clients, 2, channels).mul_(self.factor.unsqueeze(1))

    def scaled(self) -> Tensor:
        """Returns both sums, multiplied by the factor, (K, 2C) in float64."""
        values_KD = torch.cat([self.of_gradient, self.of_product], dim=1).double()
        self.scale(values_KD)
        return values_KD


class ClientWeights:
    """The contributions of a message's clients, with weights p_k and n_k values per channel."""

    def __init__(self, weights: Sequence[float], counts: Sequence[int]) -> None:
        are_valid = all(math.isfinite(p) and p >= 0 for p in weights)
        pairs = list(zip(weights, counts, strict=True))
        has_empty = any(p > 0 and n == 0 for p, n in pairs)
        self._weights = tuple(p if 0 < p < math.inf and n > 0 else 0.0 for p, n in pairs)
        self._is_absent = tuple(p == 0 for p in self._weights)
        count = sum(n for p, n in zip(self._weights, counts, strict=True) if p > 0)
        total = sum(self._weights) if are_valid else math.nan
        self.header = math.inf if has_empty else count, total
        """n and P."""

    def weigh(self, values_KD: Tensor) -> None:
        """Multiplies each client's values by p_k, in place; NaN of a client without weight too."""
        if len(self._weights) == 1:  # numbers are faster than tensors
            p = self._weights[0]
            values_KD.zero_() if p == 0 else values_KD.mul_(p)
            return
        if any(self._is_absent):
            absent_K = constant(self._is_absent, torch.bool, values_KD.device)
            values_KD.masked_fill_(absent_K.unsqueeze(1), 0.0)
        p_K = constant(self._weights, values_KD.dtype, values_KD.device)
        values_KD.mul_(p_K.unsqueeze(1))


def pack(
    tag: Tensor,
    weights: ClientWeights,
    parts: Sequence[Tensor],
    prepare: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Returns this rank's message, (4 + D,) float64: the header and the weighted values.

    The values are those of ``parts``, (K, ...) each, side by side; ``prepare`` may change them in
    place, (K, D) in float64, before they are weighted.  ``tag`` is [t, t^2] in float64.
    """
    header = constant(weights.header, torch.float64, tag.device)
    clients = len(parts[0])
    in_one = clients == 1 and tag.device.type == "cpu"
    if in_one:  # torch.cat converts the values on the way, on a CPU in one operation
        message = torch.cat([tag, header, *(part[0] for part in parts)])
        values_KD = message[HEADER:].unsqueeze(0)
    else:
        values_KD = torch.cat([*parts], dim=1).double()
    if prepare is not None:
        prepare(values_KD)
    weights.weigh(values_KD)
    if in_one:
        return message
    return torch.cat([tag, header, values_KD[0] if clients == 1 else values_KD.sum(0)])


def merge(messages: Sequence[Tensor]) -> Tensor:
    """Returns the message of a rank from those of its clients; the tag is their mean."""
    if any(message.shape != messages[0].shape for message in messages):
        raise RuntimeError(different_calls.ON_ONE_RANK)
    total = torch.stack(list(messages)).sum(0)
    total[:2] /= len(messages)
    return total


def check_weights(header: Sequence[float], ranks: int) -> None:
    """Raises ``ValueError`` for weights and batches that the header of a summed message shows.

    All ranks raise the same error.
    """
    count, total = header[2:]
    if math.isnan(total):
        raise ValueError(f"a weight on {ranks} ranks is negative or not finite")
    if math.isinf(count):
        raise ValueError("a batch is empty, with a weight above 0")
    if abs(total - 1) > WEIGHT_TOLERANCE:
        raise ValueError(f"the weights sum to {total:.9g} over {ranks} ranks, not to 1")
    if count < 2:
        raise ValueError("one value per channel on all ranks together; a variance needs two")
