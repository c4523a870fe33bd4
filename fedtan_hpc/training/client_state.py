"""What clients keep to themselves between rounds, on whichever rank hosted them last.

A client's state is one vector of its private tensors.  Where each state lies follows from the
rounds alone, so every rank knows it; states that must move to another rank do so in one message.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config.algorithms import ParameterGroup
from ..distributed import collectives, process_group
from ..models.parameter_groups import TensorFilter, pack, unpack

_MESSAGE_BYTES = 2**26


class PrivateStates:
    """The states of the clients that this rank hosted last; all others have never been drawn.

    ``fits(bytes)`` says whether so much more may stay on a GPU; what does not is kept in host
    memory.
    """

    def __init__(
        self, model: nn.Module, parts: Collection[ParameterGroup], fits: Callable[[int], bool]
    ) -> None:
        self._select = TensorFilter(model, parts)
        self._fits = fits
        self._first = pack(self._select(model).values())
        """Every client's state before it is drawn."""
        self._states: dict[int, Tensor] = {}
        self._owners: dict[int, int] = {}
        self.parts = frozenset(parts)
        self.exist = bool(parts)
        """Whether the algorithm has private parts at all."""
        self.are_models = bool(self.parts - {ParameterGroup.mixing})
        """Whether a client's own model is another one in evaluation too."""

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

    def owner(self, client: int) -> int | None:
        """The rank that has the state of ``client``; None for one that has never been drawn."""
        return self._owners.get(client)

    def drawn(self) -> list[int]:
        """Clients that have taken part in a round, ascending; the same on all ranks."""
        return sorted(self._owners)

    def move(self, hosted: Sequence[Collection[int]], training: bool = True) -> None:
        """Bring states to the ranks that host their clients now, ``hosted`` by rank.

        One collective, and none if every state is where it is needed; several for very many.
        """
        if not self.exist:
            return
        per_message = max(1, _MESSAGE_BYTES // max(1, self._first.nbytes))
        new = {client: rank for rank, clients in enumerate(hosted) for client in clients}
        moving = [c for c in sorted(new) if self._owners.get(c, new[c]) != new[c]]
        for start in range(0, len(moving), per_message):
            self._exchange(moving[start : start + per_message], new, training)
        self._owners.update(new)

    def _exchange(self, moving: Sequence[int], new: Mapping[int, int], training: bool) -> None:
        message = self._first.new_zeros(len(moving), len(self._first))
        for row, client in enumerate(moving):
            if client in self._states:
                message[row] = self._states.pop(client)
        collectives.sum_for_moving(message) if training else collectives.sum_over_ranks(message)
        for row, client in enumerate(moving):
            if new[client] == process_group.rank():
                self._keep(client, message[row].clone())

    def _keep(self, client: int, state: Tensor) -> None:
        to_cpu = state.is_cuda and not self._fits(state.nbytes)
        self._states[client] = collectives.to_cpu(state) if to_cpu else state

    def memory(self) -> tuple[list[int], Tensor]:
        """Clients whose states this rank has, ascending, and the states, (K, D) on the CPU."""
        clients = sorted(self._states)
        states = [self._states[client].cpu() for client in clients]
        empty = torch.empty(0, len(self._first), dtype=self._first.dtype)
        return clients, torch.stack(states) if states else empty

    def recall(self, clients: Sequence[int], states_KD: Tensor, owners: Mapping[int, int]) -> None:
        """Take up the states that this rank is given of those of all ``owners``' clients."""
        self._owners = dict(owners)
        self._states = {}
        for client, state in zip(clients, states_KD, strict=True):
            self._keep(client, state.to(self._first.device, copy=True))

    def state_bytes(self) -> int:
        """Of one client."""
        return self._first.nbytes

    def on_device(self, message: Tensor) -> Tensor:
        """``message`` where the ranks' collectives are."""
        return message.to(self._first.device)

    def owners(self) -> dict[int, int]:
        """The rank that has each state there is."""
        return dict(self._owners)

    def named(self, client: int, module: nn.Module) -> dict[str, Tensor]:
        """The state of ``client`` by tensor name, on the CPU of every rank; for saving it."""
        state = self._states.get(client, self._first).to(self._first.device, copy=True)
        owner = self.owner(client)
        if owner is not None:
            if process_group.rank() != owner:
                state.zero_()
            collectives.sum_over_ranks(state)
        like = self._select(module)
        values = {name: torch.empty_like(value, device="cpu") for name, value in like.items()}
        unpack(collectives.to_cpu(state), values.values())
        return {name: value.detach() for name, value in values.items()}
