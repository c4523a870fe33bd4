"""The ranks that hold one client together: each takes a part of the client's batches.

With R ranks a client, rank r belongs to group r // R.  A member m of the group has b_m of the B
samples of a batch, and its loss is the mean over them.  So the client's loss, gradient and BN
statistics are the means over the members with the shares b_m / B: in a local step the BN layers
are FedTAN's, on the group.  All members take the same optimizer steps on equal models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..batchnorm.context import chosen_layers, statistics_of_client
from ..data.batching import WHOLE, Part
from ..distributed import process_group
from .client_gradients import ClientGradients


@dataclass(frozen=True)
class ClientRanks:
    """This rank's group; by default it holds clients alone."""

    part: Part = WHOLE
    group: process_group.Group = None
    number: int = 0
    """The number of the group, from 0."""
    overlap_group: process_group.Group = None
    """Another group of the same ranks, if gradients are summed during the backward pass."""

    @classmethod
    def of(cls, ranks_per_client: int, overlaps: bool = True) -> "ClientRanks":
        """Makes the groups of consecutive ranks; all ranks call it together.

        ``overlaps``: whether gradients of a large model are summed during the backward pass.
        """
        rank = process_group.rank()
        part = Part(rank % ranks_per_client, ranks_per_client)
        group, overlap_group = process_group.consecutive_groups(ranks_per_client), None
        if overlaps:
            overlap_group = process_group.consecutive_groups(ranks_per_client, number=1)
        return cls(part, group, rank // ranks_per_client, overlap_group)

    @property
    def are_many(self) -> bool:
        """Whether a client has more than one rank."""
        return self.part.members > 1

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the group: its model and states count, and no other's."""
        return self.part.member == 0

    @contextmanager
    def statistics(
        self, module: nn.Module, share: float, global_layers: frozenset[str] | None = frozenset()
    ) -> Iterator[None]:
        """Gives the BN layers of ``module`` the statistics of the client's whole batch.

        Those of ``global_layers`` are left out (None: all), as another context has them.
        """
        if not self.are_many or global_layers is None:
            yield
            return
        names = [name for name in chosen_layers(module, None) if name not in global_layers]
        with statistics_of_client(module, names, share, self.group):
            yield

    def gradients(self, module: nn.Module, share: float) -> ClientGradients:
        """Returns what sums the gradients of ``module`` over the client's ranks."""
        values = [value for value in module.parameters() if value.requires_grad]
        return ClientGradients(values, share, self.group, self.overlap_group)


ALONE = ClientRanks()
"""The ranks of a client that this rank holds by itself."""
