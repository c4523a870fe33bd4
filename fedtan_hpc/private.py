"""What clients keep to themselves between rounds, on whichever rank hosted them last.

A client's state is one vector of its private tensors.  Where each state lies follows from the
rounds alone, so every rank knows it; states that must move to another rank do so in one message.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from . import comm
from .algorithms import Part
from .parts import Selection, pack, unpack


class PrivateStates:
    """The states of the clients that this rank hosted last; all others have never been drawn.

    ``fits(bytes)`` says whether so much more may stay on a GPU; what does not is kept in host
    memory.
    """

    def __init__(
        self, model: nn.Module, parts: Collection[Part], fits: Callable[[int], bool]
    ) -> None:
        self._select = Selection(model, parts)
        self._fits = fits
        self._first = pack(self._select(model).values())
        """Every client's state before it is drawn."""
        self._states: dict[int, Tensor] = {}
        self._owners: dict[int, int] = {}
        self.exist = bool(parts)
        """Whether the algorithm has private parts at all."""

    def load(self, client: int, module: nn.Module) -> None:
        """Give ``module`` the private values of ``client``."""
        if self.exist:
            unpack(self._states.get(client, self._first), self._select(module).values())

    def save(self, client: int, module: nn.Module) -> None:
        """Keep the private values of ``module`` as those of ``client``."""
        if self.exist:
            self._keep(client, pack(self._select(module).values()))

    def reset(self, module: nn.Module) -> None:
        """Give ``module`` the values that a client has before it is drawn."""
        if self.exist:
            unpack(self._first, self._select(module).values())

    def owner(self, client: int) -> int:
        """The rank that has the state of ``client``; of one never drawn, any."""
        return self._owners.get(client, client % comm.world_size())

    def is_first(self, client: int) -> bool:
        """Whether the client has never been drawn."""
        return client not in self._owners

    def move(self, hosted: Sequence[Collection[int]]) -> None:
        """Bring states to the ranks that host their clients now, ``hosted`` by rank.

        One collective, and none if every state is where it is needed.
        """
        if not self.exist:
            return
        new = {client: rank for rank, clients in enumerate(hosted) for client in clients}
        moving = [c for c in sorted(new) if self._owners.get(c, new[c]) != new[c]]
        if moving:
            self._exchange(moving, new)
        self._owners.update(new)

    def _exchange(self, moving: Sequence[int], new: Mapping[int, int]) -> None:
        message = self._first.new_zeros(len(moving), len(self._first))
        for row, client in enumerate(moving):
            if client in self._states:
                message[row] = self._states.pop(client)
        comm.sum_for_training(message)
        for row, client in enumerate(moving):
            if new[client] == comm.rank():
                self._keep(client, message[row].clone())

    def _keep(self, client: int, state: Tensor) -> None:
        on_host = state.is_cuda and not self._fits(state.nbytes)
        self._states[client] = state.cpu() if on_host else state

    def named(self, clients: Collection[int], module: nn.Module) -> dict[int, dict[str, Tensor]]:
        """The states of ``clients`` by tensor name, gathered on every rank; for saving them."""
        found = {}
        for client in clients:
            state = self._states.get(client, self._first).to(self._first.device, copy=True)
            if comm.rank() != self.owner(client):
                state.zero_()
            found[client] = self._as_tensors(comm.sum_over_ranks(state), module)
        return found

    def _as_tensors(self, state: Tensor, module: nn.Module) -> dict[str, Tensor]:
        like = self._select(module)
        values = {
            name: torch.empty_like(value, requires_grad=False) for name, value in like.items()
        }
        unpack(state, values.values())
        return values
