"""Exchanges of BN statistics between all clients, in the context of a synchronised step.

A ``GlobalStatistics`` serves the layers during one synchronised step.  It gives each use of a layer
a ``GlobalStatisticsCall``, which packs the message of this rank (``messages``), sums it over all
clients and reads the sum.  All running statistics move together when the context ends.  ``context``
and ``training.stacked`` open it; ``global_kernels`` and ``compile_ops`` use its calls.

Shapes: K clients that this rank stacks (1 if it does not), C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..distributed import collectives, different_calls, process_group
from ..distributed.lockstep import Lockstep
from ..runtime.transfer import constant
from .local_kernels import RunningBuffers
from .messages import HEADER, TAGS, ClientWeights, Derivatives, check_weights, pack

_MAX_CALLS = 256
"""Uses of a layer after which tags repeat, and headers and moments that wait."""
_STEPS = ("forward", "forward, for the variance", "backward")


class Moments(NamedTuple):
    """Global moments of one use of a layer, towards which its running statistics move."""

    owner: Any
    """The running statistics: a ``layer.Tracked``, or those of a stack."""
    mean: Tensor
    variance: Tensor
    """Biased, like ``mean`` (C,)."""
    count: Any
    """n, values per channel, by which the variance becomes unbiased: a number, or 0-d."""


Verify = Callable[[Sequence[float]], None]
"""Raises an error if the header of a sum shows a mistake."""
MoveTogether = Callable[[Sequence[Moments]], None]
"""Moves the running statistics of all owners, in the order of their uses."""


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

    def share_derivatives(self, counts: Sequence[int], sums: Derivatives) -> Tensor:
        """Takes each client's two sums per channel; returns those to use, (2C,) or (K, 2C)."""


class BatchNormContext(Protocol):
    """The source of a layer's statistics while it is not ordinary local BN."""

    @property
    def is_stacked(self) -> bool:
        """Whether the layers run under ``torch.func.vmap``, with all clients of a stack at once."""

    def call(self, index: int, owner: Any) -> LayerCall:
        """Begins the next use of layer ``index``; ``owner`` has its running statistics, if any."""

    def move_running_statistics(self) -> None:
        """Moves running statistics that wait for the end of the context."""


@dataclass(frozen=True)
class GlobalStatisticsCall:
    """One use of a layer with global statistics."""

    context: GlobalStatistics
    layer: str
    number: int
    """The number of the use; all ranks that run the same layers count alike."""
    owner: Any
    mask_KN: Tensor | None
    sizes: Sequence[int]
    local_buffers = None

    def share_moments(
        self, counts: Sequence[int], mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the global mean and biased variance, (C,) each; notes them for the layer.

        Every way to run a layer calls this exactly once for each use, outside of any tracing.
        """
        weights = self.context.client_weights(counts)
        is_double = mean_KC.dtype is torch.float64
        share = self._share_in_two_exchanges if is_double else self._share_in_one_exchange
        n, moments = share(weights, mean_KC, variance_KC)
        mean_C, variance_C = moments.to(mean_KC.dtype).chunk(2)
        self.context.move_soon(Moments(self.owner, mean_C, variance_C, n))
        return mean_C, variance_C

    def _share_in_one_exchange(
        self, weights: ClientWeights, mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Any, Tensor]:
        """Returns n, and (2C,) the mean sum p m and the variance sum p (v + m^2) - mean^2.

        In float64 the difference loses (mean / spread)^2 / 2^53.  Rounding the batch's values to
        the 24 bits of float32 has lost (mean / spread)^2 / (12 * 2^48), which is more.
        """
        n, moments = self._exchange(0, weights, (mean_KC, variance_KC), _add_square)
        mean_C, variance_C = moments.chunk(2)
        variance_C.addcmul_(mean_C, mean_C, value=-1).clamp_min_(0.0)
        return n, moments

    def _share_in_two_exchanges(
        self, weights: ClientWeights, mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Any, Tensor]:
        """Returns n, and (2C,) the mean sum p m and the variance sum p (v + (m - mean)^2).

        The paper does so.  The second exchange needs the global mean; it loses nothing where the
        mean is large.
        """
        n, mean_C = self._exchange(0, weights, (mean_KC,))
        deviation_KC = mean_KC - mean_C
        about_mean_KC = torch.addcmul(variance_KC, deviation_KC, deviation_KC)
        _, variance_C = self._exchange(1, weights, (about_mean_KC,))
        return n, torch.cat([mean_C, variance_C])

    def share_derivatives(self, counts: Sequence[int], sums: Derivatives) -> Tensor:
        """Returns sum_k p_k factor_k sums_k of the clients' sums, (2C,) float64."""
        weights = self.context.client_weights(counts)
        return self._exchange(2, weights, sums[:2], sums.scale, is_mean=False)[1]

    def _exchange(
        self,
        step: int,
        weights: ClientWeights,
        parts: Sequence[Tensor],
        prepare: Callable[[Tensor], None] | None = None,
        is_mean: bool = True,
    ) -> tuple[Any, Tensor]:
        """Returns n and the values of the sum of all messages, divided by P if it ``is_mean``.

        ``step`` counts the exchanges of this use.  The values belong to the caller.
        """
        context, device = self.context, parts[0].device
        place = f"BN layer {self.layer} ({_STEPS[step]})"
        tag = (context.model_tag + 3 * self.number + step) % TAGS
        tags = constant((tag, tag * tag), torch.float64, device)
        message = context.sum(pack(tags, weights, parts, prepare), place)
        n, total = context.read_header(message[:HEADER], partial(self._verify, tag, place))
        values = message[HEADER:]
        return n, values.div_(total) if is_mean else values

    def _verify(self, tag: int, place: str, header: Sequence[float]) -> None:
        ranks = process_group.world_size(self.context.group)
        different_calls.check_tag(header, tag, place, self.context.group)
        try:
            check_weights(header, ranks)
        except ValueError as error:
            raise ValueError(f"layer {self.layer}: {error}") from None


def _add_square(moments_KD: Tensor) -> None:
    """Adds the squares of the means to the variances beside them, in place."""
    mean_KC, variance_KC = moments_KD.chunk(2, dim=1)
    variance_KC.addcmul_(mean_KC, mean_KC)


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
    move: MoveTogether | None = None
    """Moves running statistics when the context ends; None leaves them."""
    owners: Sequence[Any] | None = None
    """By layer, in place of the layers: a stack has running statistics for each client."""
    is_stacked: bool = False
    model_tag: int = 0
    """Tells the model from others; the tags of its exchanges follow it."""
    is_open: bool = True
    _moved: list[Moments] = field(default_factory=list)
    _calls: list[int] = field(default_factory=list)
    _unverified: list[tuple[Tensor, Verify]] = field(default_factory=list)
    _weights_by_counts: dict[tuple[int, ...], ClientWeights] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._calls = [0] * len(self.layers)

    def call(self, index: int, owner: Any) -> GlobalStatisticsCall:
        """Begins the next use of layer ``index``."""
        self._calls[index] = (self._calls[index] + 1) % _MAX_CALLS
        number = self._calls[index] * len(self.layers) + index
        owner = owner if self.owners is None else self.owners[index]
        name = self.layers[index]
        return GlobalStatisticsCall(self, name, number, owner, self.mask_KN, self.sizes)

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
        return self.lockstep.exchange(message).clone()  # the other clients read it too

    def read_header(self, header: Tensor, verify: Verify) -> Sequence[Any]:
        """Checks the header of a sum; returns n and P, as numbers on a CPU, else 0-d."""
        if header.device.type == "cpu":
            numbers = header.tolist()
            verify(numbers)
            return numbers[2:]
        self._unverified.append((header, verify))
        if not self.is_open or len(self._unverified) > _MAX_CALLS:
            self._verify()
        return header[2:].unbind()

    def close(self) -> None:
        """Moves the running statistics; raises the first error that the delayed checks find."""
        self.is_open = False
        self._verify()
        self.move_running_statistics()

    def move_soon(self, moments: Moments) -> None:
        """Notes the moments of a use; running statistics move when the context ends."""
        if moments.owner is not None:
            self._moved.append(moments)
        if len(self._moved) > _MAX_CALLS:
            self.move_running_statistics()

    def move_running_statistics(self) -> None:
        """Moves the running statistics towards the moments since the last call."""
        moved, self._moved = self._moved, []
        if self.move is not None:
            self.move(moved)

    def _verify(self) -> None:
        unverified, self._unverified = self._unverified, []
        if unverified:
            headers = collectives.to_cpu(torch.stack([header for header, _ in unverified]))
            for header, (_, verify) in zip(headers.tolist(), unverified, strict=True):
                verify(header)
