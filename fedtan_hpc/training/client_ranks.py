"""The ranks that hold one client together: each takes a part of the client's batches.

With R ranks a client, rank r belongs to group r // R.  A member m of the group has b_m of the B
samples of a batch, and its loss is the mean over them.  So the client's loss, gradient and BN
statistics are the means over the members with the shares b_m / B: in a local step the BN layers
are FedTAN's, on the group.  All members take the same optimizer steps on equal models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..batchnorm.context import chosen_layers, statistics_of_client
from ..data.batching import WHOLE, Part
from ..distributed import collectives, process_group
from ..models.parameter_groups import pack, unpack
from .optimizers import trained_parameters


@dataclass(frozen=True)
class ClientRanks:
    """This rank's group; by default it holds clients alone."""

    part: Part = WHOLE
    group: process_group.Group = None
    number: int = 0
    """The number of the group, from 0."""

    @classmethod
    def of(cls, ranks_per_client: int) -> "ClientRanks":
        """Makes the groups of consecutive ranks; all ranks call it together."""
        rank = process_group.rank()
        part = Part(rank % ranks_per_client, ranks_per_client)
        group = process_group.consecutive_groups(ranks_per_client)
        return cls(part, group, rank // ranks_per_client)

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

    def average_gradients(self, module: nn.Module, share: float) -> None:
        """Sets the gradients of ``module`` to the client's, in one message within the group."""
        if not self.are_many:
            return
        gradients = [each.grad for each in trained_parameters(module).values()]
        present = [gradient for gradient in gradients if gradient is not None]
        message = pack(present)
        message = message.mul_(share) if share else torch.zeros_like(message)
        unpack(collectives.sum_for_client(message, self.group, "a client's gradients"), present)


ALONE = ClientRanks()
"""The ranks of a client that this rank holds by itself."""
