"""Exchanges of BN statistics between all clients: what a message holds and what its sum tells.

A ``GlobalStatistics`` serves the layers during one synchronised step.  It gives each use of a layer
a ``GlobalStatisticsCall``, which packs the message of this rank, sums it over all clients and reads
the sum.  ``context`` and ``training.vmap_clients`` open it; ``global_kernels`` and ``compile_ops``
use its calls.

A message is float64: a header [t, t^2, n, P], then the values of the channels.
- The tag t stands for the model, the layer, its use and the exchange.  The sum over R ranks of t^2
  is (sum of t)^2 / R only if all ranks send one t.
- n is the number of values per channel, and P the sum of p_k, of the clients that take part: those
  with a weight above 0.  A weight that is negative or not finite makes P NaN; an empty batch of a
  client with a weight above 0 makes n infinite.
All ranks read the same sum, and so all raise the same error.

Shapes: K clients that this rank stacks (1 if it does not), C channels, D values of a message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..distributed import collectives, different_calls, process_group
from ..runtime.transfer import constant
from .local_kernels import RunningBuffers
from .lockstep import Lockstep

WEIGHT_TOLERANCE = 1e-6
"""How far the sum of all weights may be from 1."""
HEADER = 4
"""Numbers of a message before the values of the channels."""

_MAX_CALLS = 256
"""Uses of a layer after which tags repeat, and GPU headers that wait for their check."""
_TAGS = 1_048_573
"""Number of tags, a prime; the sum of their squares is exact in float64 on up to 8192 ranks."""
_STEPS = ("forward", "forward, for the variance", "backward")

Update = Callable[[Tensor, Tensor], None]
"""Moves a layer's running statistics towards a mean and an unbiased variance, (C,) or (K, C)."""


class LayerCall(Protocol):
    """One use of one layer: what the kernels ask of it."""

    @property
    def mask_KN(self) -> Tensor | None:
        """Which samples of padded batches are real; None if all are."""

    @property
    def sizes(self) -> Sequence[int]:
        """Real samples of each stacked client; empty for a client that is not stacked."""

    @property
    def local_buffers(self) -> Callable[[], RunningBuffers] | None:
        """Begins a use with local statistics that torch's kernels compute; None for other uses."""

    def share_moments(
        self, counts: Sequence[int], mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Takes the clients' moments of ``counts`` values; returns those to normalise by.

        The variances are biased; the results are (C,) or (K, C), in the dtype of ``mean_KC``.
        """

    def share_derivatives(self, counts: Sequence[int], sums_K2C: Tensor) -> Tensor:
        """Takes each client's two sums per channel; returns those to use, (2C,) or (K, 2C)."""


class BatchNormContext(Protocol):
    """The source of a layer's statistics while it is not ordinary local BN."""

    @property
    def is_stacked(self) -> bool:
        """Whether the layers run under ``torch.func.vmap``, with all clients of a stack at once."""

    def call(self, index: int, update: Update) -> LayerCall:
        """Begins the next use of layer ``index``, whose running statistics ``update`` moves."""


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

    def weighted_sum(self, values_KD: Tensor) -> Tensor:
        """Returns sum_k p_k values_k, (D,) float64; a client without weight may hold NaN."""
        values = values_KD.double()
        if any(self._is_absent):
            absent_K = constant(self._is_absent, torch.bool, values.device)
            values = values.masked_fill(absent_K.unsqueeze(1), 0.0)
        if len(self._weights) == 1:  # multiplying by a number is faster
            return values.squeeze(0) * self._weights[0]
        p_K = constant(self._weights, values.dtype, values.device)
        return (values * p_K.unsqueeze(1)).sum(0)


def pack(tag: int, weights: ClientWeights, values_KD: Tensor) -> Tensor:
    """Returns this rank's message, (4 + D,) float64: the header and the weighted values."""
    header = constant((tag, tag * tag, *weights.header), torch.float64, values_KD.device)
    return torch.cat([header, weights.weighted_sum(values_KD)])


def merge(messages: Sequence[Tensor]) -> Tensor:
    """Returns the message of a rank from those of its clients; the tag is their mean."""
    if any(message.shape != messages[0].shape for message in messages):
        raise RuntimeError(different_calls.ON_ONE_RANK)
    total = torch.stack(list(messages)).sum(0)
    total[:2] /= len(messages)
    return total


def check_weights(header: Tensor, ranks: int) -> None:
    """Raises ``ValueError`` for weights and batches that the header of a summed message shows.

    All ranks raise the same error.
    """
    count, total = header[2:].tolist()
    if math.isnan(total):
        raise ValueError(f"a weight on {ranks} ranks is negative or not finite")
    if math.isinf(count):
        raise ValueError("a batch is empty, with a weight above 0")
    if abs(total - 1) > WEIGHT_TOLERANCE:
        raise ValueError(f"the weights sum to {total:.9g} over {ranks} ranks, not to 1")
    if count < 2:
        raise ValueError("one value per channel on all ranks together; a variance needs two")


@dataclass(frozen=True)
class GlobalStatisticsCall:
    """One use of a layer with global statistics."""

    context: GlobalStatistics
    layer: str
    number: int
    """The number of the use; all ranks that run the same layers count alike."""
    update: Update
    mask_KN: Tensor | None
    sizes: Sequence[int]
    local_buffers = None

    def share_moments(
        self, counts: Sequence[int], mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the global mean and biased variance, (C,) each; moves the running statistics.

        Every way to run a layer calls this exactly once for each use, outside of any tracing.
        """
        weights = self.context.client_weights(counts)
        is_double = mean_KC.dtype is torch.float64
        share = self._share_in_two_exchanges if is_double else self._share_in_one_exchange
        n, *moments = share(weights, mean_KC, variance_KC)
        mean_C, variance_C = (moment.to(mean_KC.dtype) for moment in moments)
        self.update(mean_C, variance_C * (n / (n - 1)))
        return mean_C, variance_C

    def _share_in_one_exchange(
        self, weights: ClientWeights, mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Any, Tensor, Tensor]:
        """Returns n, the mean sum p m and the variance sum p (v + m^2) - mean^2.

        In float64 the difference loses (mean / spread)^2 / 2^53.  Rounding the batch's values to
        the 24 bits of float32 has lost (mean / spread)^2 / (12 * 2^48), which is more.
        """
        mean, second = mean_KC.double(), variance_KC.double()
        second.addcmul_(mean, mean)
        message = self._exchange(0, weights, torch.cat([mean, second], dim=1))
        n, total = _count_and_weight(message)
        mean_C, second_C = (message[HEADER:] / total).chunk(2)
        variance_C = torch.addcmul(second_C, mean_C, mean_C, value=-1).clamp_min_(0.0)
        return n, mean_C, variance_C

    def _share_in_two_exchanges(
        self, weights: ClientWeights, mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Any, Tensor, Tensor]:
        """Returns n, the mean sum p m and the variance sum p (v + (m - mean)^2), as in the paper.

        The second exchange needs the global mean; it loses nothing where the mean is large.
        """
        message = self._exchange(0, weights, mean_KC)
        n, total = _count_and_weight(message)
        mean_C = message[HEADER:] / total
        deviation_KC = mean_KC - mean_C
        about_mean_KC = torch.addcmul(variance_KC, deviation_KC, deviation_KC)
        return n, mean_C, self._exchange(1, weights, about_mean_KC)[HEADER:] / total

    def share_derivatives(self, counts: Sequence[int], sums_K2C: Tensor) -> Tensor:
        """Returns sum_k p_k sums_k of the clients' two sums per channel, (2C,) float64."""
        return self._exchange(2, self.context.client_weights(counts), sums_K2C)[HEADER:]

    def _exchange(self, step: int, weights: ClientWeights, values_KD: Tensor) -> Tensor:
        """Returns the sum of all messages of one collective; ``step`` counts those of this use."""
        place = f"BN layer {self.layer} ({_STEPS[step]})"
        tag = (self.context.model_tag + 3 * self.number + step) % _TAGS
        message = self.context.sum(pack(tag, weights, values_KD), place)
        self.context.verify_soon(message[:HEADER], partial(self._verify, tag, place))
        return message

    def _verify(self, tag: int, place: str, header: Tensor) -> None:
        ranks = process_group.world_size(self.context.group)
        different_calls.check_tag(header, tag, place, self.context.group)
        try:
            check_weights(header, ranks)
        except ValueError as error:
            raise ValueError(f"layer {self.layer}: {error}") from None


def _count_and_weight(message: Tensor) -> Sequence[Any]:
    """Returns n and P: numbers on a CPU, where they are faster, and tensors on a GPU."""
    values = message[2:HEADER]
    return values.tolist() if values.device.type == "cpu" else values.unbind()


@dataclass
class GlobalStatistics:
    """The context of a synchronised step: this rank's weights p_k, and the ranks that take part.

    On a CPU the header of each message is checked at once.  On a GPU, where reading a value waits
    for the device, all headers are checked together when the context ends.
    """

    weights: Sequence[float]
    group: process_group.Group
    layers: Sequence[str]
    """Names of the module's BN layers, in the order of ``batchnorm_layers``."""
    lockstep: Lockstep[Any] | None = None
    """Where this client meets the other clients of its rank, if they run in lock-step."""
    mask_KN: Tensor | None = None
    """Which samples of a padded stack are real; None if all are."""
    sizes: Sequence[int] = ()
    """Real samples of each stacked client."""
    updates: Sequence[Update] | None = None
    """By layer, in place of the layers' updates: a stack has running statistics for each client."""
    is_stacked: bool = False
    model_tag: int = 0
    """Tells the model from others; the tags of its exchanges follow it."""
    is_open: bool = True
    _calls: list[int] = field(default_factory=list)
    _unverified: list[tuple[Tensor, Callable[[Tensor], None]]] = field(default_factory=list)
    _weights_by_counts: dict[tuple[int, ...], ClientWeights] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._calls = [0] * len(self.layers)

    def call(self, index: int, update: Update) -> GlobalStatisticsCall:
        """Begins the next use of layer ``index``."""
        self._calls[index] = (self._calls[index] + 1) % _MAX_CALLS
        number = self._calls[index] * len(self.layers) + index
        update = update if self.updates is None else self.updates[index]
        name = self.layers[index]
        return GlobalStatisticsCall(self, name, number, update, self.mask_KN, self.sizes)

    def client_weights(self, counts: Sequence[int]) -> ClientWeights:
        """Returns what the clients contribute with so many values per channel each."""
        key = tuple(counts)
        if key not in self._weights_by_counts:
            self._weights_by_counts[key] = ClientWeights(self.weights, key)
        return self._weights_by_counts[key]

    def sum(self, message: Tensor, place: str) -> Tensor:
        """Returns the sum over the clients of this rank and of all ranks; one collective."""
        if self.lockstep is None:
            return collectives.sum_for_training(message, self.group, call=place)
        return self.lockstep.exchange(message)

    def verify_soon(self, header: Tensor, verify: Callable[[Tensor], None]) -> None:
        """Runs ``verify`` at once on a CPU; on a GPU later, with all others."""
        if header.device.type == "cpu":
            verify(header)
            return
        self._unverified.append((header, verify))
        if not self.is_open or len(self._unverified) > _MAX_CALLS:
            self._verify()

    def close(self) -> None:
        """Ends the context; raises the first error that the delayed checks find."""
        self.is_open = False
        self._verify()

    def _verify(self) -> None:
        unverified, self._unverified = self._unverified, []
        if unverified:
            headers = collectives.to_cpu(torch.stack([header for header, _ in unverified]))
            for header, (_, verify) in zip(headers, unverified, strict=True):
                verify(header)
