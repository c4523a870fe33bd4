"""BN statistics that are local in one half of a pass and global in the other.

The paper (FedTAN, arXiv 2301.02982) names two causes of the gradient deviation: in the forward pass
a client normalises by the moments of its batch, and in the backward pass it uses the derivatives of
its own loss by these moments.  A ``Halves`` says which of both are those of all clients.

With the moments mean_k and v_k by which client k normalises, r_k = 1 / sqrt(v_k + eps) and
xhat = (x - mean_k) r_k, the derivatives of client k's loss by them are

    dF_k/dmean = -r_k gamma sum g,      dF_k/dv = -r_k^2 / 2  gamma sum g xhat

Global derivatives are D = sum_k p_k dF_k.  Each client puts them into its own chain rule:

    dx = r_k gamma g + (D_mean + 2 (x - mean_k) D_v) / n_k

Shapes: L layers, C channels; one client for each context.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..batchnorm.messages import Derivatives
from ..batchnorm.statistics_call import GlobalStatistics, GlobalStatisticsCall


class Halves(NamedTuple):
    """Which half of a pass has global statistics; the other half has those of the client."""

    forward: bool
    backward: bool


CAUSES = {
    "forward": Halves(forward=False, backward=True),
    "backward": Halves(forward=True, backward=False),
    "both": Halves(forward=False, backward=False),
}
"""The halves in which statistics are mismatched, by the name of the cause."""
GLOBAL = Halves(forward=True, backward=True)


_LARGEST = 1e30
"""Stands for distances that are not finite."""


@dataclass
class MixedStatistics:
    """The context of one client's pass; no running statistics move."""

    halves: Halves
    exchange: GlobalStatistics
    """Sums the clients' messages; it must not know running statistics."""
    eps: Sequence[float]
    """By layer."""
    distances: list[list[Tensor]] = field(default_factory=list)
    """Of each use of each layer with global moments: ``probe_records.DISTANCES``, (3,)."""
    is_stacked = False

    def __post_init__(self) -> None:
        self.distances = [[] for _ in self.eps]

    def call(self, index: int, owner: object) -> "_MixedCall":
        """Begins the next use of layer ``index``, whose running statistics stay."""
        return _MixedCall(self, index, self.exchange.call(index, None))

    def move_running_statistics(self) -> None:
        """Does nothing."""

    def note(self, index: int, local: Sequence[Tensor], shared: Sequence[Tensor]) -> None:
        """Notes how far a client's mean and variance, (C,) each, are from the global ones."""
        (m, v), (mean, variance) = local, shared
        ratio = (v + self.eps[index]) / (variance + self.eps[index])
        shift = (m - mean) / (variance + self.eps[index]).sqrt()
        kl = 0.5 * (ratio - 1 - ratio.log() + shift.square())
        means = [each.double().mean() for each in (shift.abs(), ratio.log().abs(), kl)]
        self.distances[index].append(torch.stack(means).nan_to_num(_LARGEST, _LARGEST))

    def mean_distances(self) -> Tensor:
        """Returns the distances in each layer, means over its uses, (L, 3); 0 if it had none."""
        rows = [torch.stack(uses).mean(0).cpu() for uses in self.distances if uses]
        distances_L3 = torch.zeros(len(self.distances), 3, dtype=torch.float64)
        if rows:
            distances_L3[[bool(uses) for uses in self.distances]] = torch.stack(rows)
        return distances_L3


@dataclass
class _MixedCall:
    """One use of one layer by one client."""

    context: MixedStatistics
    index: int
    shared: GlobalStatisticsCall
    mask_KN = None
    sizes = ()
    local_buffers = None

    def share_moments(
        self, counts: Sequence[int], mean_KC: Tensor, variance_KC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the moments to normalise by, (C,) each."""
        local = mean_KC[0], variance_KC[0]
        self._spread_C = local[1] + self.context.eps[self.index]
        if not self.context.halves.forward:
            return local
        shared = self.shared.share_moments(counts, mean_KC, variance_KC)
        self.context.note(self.index, local, shared)
        return shared

    def share_derivatives(self, counts: Sequence[int], sums: Derivatives) -> Tensor:
        """Returns r s1 and r s2 of ``global_kernels``, (2C,), by own or global derivatives.

        With moments of its own a client has r_k in its xhat, and the derivative by the variance has
        r_k^2: so the second sum is multiplied by r_k on its way, and divided by it on return.
        """
        halves = self.context.halves
        if not halves.backward:
            return sums.scaled()[0]
        if halves.forward:
            return self.shared.share_derivatives(counts, sums)
        r_C = self._spread_C.rsqrt()
        shared = self.shared.share_derivatives(
            counts, Derivatives(sums.of_gradient, sums.of_product * r_C, sums.factor)
        )
        first, second = shared.chunk(2)
        return torch.cat([first, second / r_C.to(second.dtype)])
