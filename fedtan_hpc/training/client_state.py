"""Private states: what each client keeps between rounds, on the rank that hosted it last.

A client's state is one vector of its private tensors.  The rounds alone decide on which rank it is,
so every rank knows that without asking.  The round loop moves states to the ranks that need them;
the client runners load and save them, and checkpoints hold them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config.algorithms import ParameterGroup
from ..distributed import collectives, process_group
from ..models.parameter_groups import TensorFilter, pack, unpack
from .client_ranks import ClientRanks

_MESSAGE_BYTES = 2**26


class PrivateStates:
    """The states of clients that this rank hosted last.

    Other clients' states are on other ranks; a client in no rank's ``owners`` was never drawn.
    ``fits(bytes)`` says whether that much more memory may be used on the GPU; a state that does not
    fit stays in host memory.
    """

    def __init__(
        self, model: nn.Module, parts: Collection[ParameterGroup], fits: Callable[[int], bool]
    ) -> None:
        self._select = TensorFilter(model, parts)
        self._fits = fits
        self._initial = pack(self._select(model).values())
        """The state of every client that was never drawn."""
        self._states: dict[int, Tensor] = {}
        self._borrowed: dict[int, Tensor] = {}
        """Of clients that this rank helps to train; another rank keeps their states."""
        self.owners: dict[int, int] = {}
        """The rank of each state by client, equal on all ranks."""
        self.parts = frozenset(parts)
        self.exist = bool(parts)
        """Whether the algorithm has private tensors at all."""
        self.are_models = bool(self.parts - {ParameterGroup.mixing})
        """Whether each client has a model of its own in evaluation too."""

    def load(self, client: int, module: nn.Module) -> None:
        """Copies the private values of ``client`` into ``module``."""
        if self.exist:
            known = self._borrowed.get(client, self._initial)
            state = self._states.get(client, known)
            unpack(state, self._select(module).values())

    def save(self, client: int, module: nn.Module) -> None:
        """Copies the private values of ``module`` into the state of ``client``."""
        if self.exist:
            self._store(client, pack(self._select(module).values()))

    def reset(self, module: nn.Module) -> None:
        """Gives ``module`` the private values of a client that was never drawn."""
        if self.exist:
            unpack(self._initial, self._select(module).values())

    def begin_with(self, module: nn.Module) -> None:
        """Lets clients that were never drawn begin with the private values of ``module``."""
        self._initial = pack(self._select(module).values())

    def lend(self, clients: Sequence[int], ranks: ClientRanks) -> None:
        """Gives the ranks that hold ``clients`` together the states that the first of them has."""
        self._borrowed = {}
        if not (self.exist and ranks.are_many and clients):
            return
        message = self._initial.new_zeros(len(clients), len(self._initial))
        if ranks.is_first:
            for row, client in enumerate(clients):
                message[row] = self._states.get(client, self._initial)
        collectives.sum_for_client(message, ranks.group)
        if not ranks.is_first:
            self._borrowed = dict(zip(clients, message, strict=True))

    def end_round(self) -> None:
        """Forgets what other ranks have lent: they keep the states of the round's end."""
        self._borrowed = {}

    def drawn(self) -> list[int]:
        """Returns clients that took part in a round, ascending; equal on all ranks."""
        return sorted(self.owners)

    def move(self, hosted: Sequence[Collection[int]], training: bool = True) -> None:
        """Moves states to the ranks that host their clients next; ``hosted`` lists clients by rank.

        Takes one collective, none if no state has to move, and several for very many states.
        """
        if not self.exist:
            return
        per_message = max(1, _MESSAGE_BYTES // max(1, self._initial.nbytes))
        owners = {client: rank for rank, clients in enumerate(hosted) for client in clients}
        moving = [c for c in sorted(owners) if self.owners.get(c, owners[c]) != owners[c]]
        for start in range(0, len(moving), per_message):
            self._exchange(moving[start : start + per_message], owners, training)
        self.owners.update(owners)

    def _exchange(self, moving: Sequence[int], owners: Mapping[int, int], training: bool) -> None:
        message = self._initial.new_zeros(len(moving), len(self._initial))
        for row, client in enumerate(moving):
            if client in self._states:
                message[row] = self._states.pop(client)
        if training:
            collectives.sum_for_training(message, of_models=True, is_payload=False)
        else:
            collectives.sum_over_ranks(message)
        for row, client in enumerate(moving):
            if owners[client] == process_group.rank():
                self._store(client, message[row].clone())

    def _store(self, client: int, state: Tensor) -> None:
        to_cpu = state.is_cuda and not self._fits(state.nbytes)
        self._states[client] = collectives.to_cpu(state) if to_cpu else state

    @property
    def size(self) -> int:
        """Number of values in a client's state."""
        return self._initial.numel() if self.exist else 0

    def state_dict(self) -> dict[int, Tensor]:
        """Returns the states on this rank by client, ascending, on the CPU; not copied if there."""
        return {client: self._states[client].cpu() for client in sorted(self._states)}

    def load_state_dict(self, states: Mapping[int, Tensor], owners: Mapping[int, int]) -> None:
        """Replaces all states: ``states`` has this rank's, ``owners`` the rank of each client's."""
        self.owners = dict(owners)
        self._states = {}
        for client, state in states.items():
            self._store(client, state.to(self._initial.device, copy=True))

    def named(self, client: int, module: nn.Module) -> dict[str, Tensor]:
        """Returns the state of ``client`` by tensor name, on the CPU of every rank.

        Every rank calls it.
        """
        state = self._states.get(client, self._initial).to(self._initial.device, copy=True)
        if client in self.owners:
            if process_group.rank() != self.owners[client]:
                state.zero_()
            collectives.sum_over_ranks(state)
        like = self._select(module)
        values = {name: torch.empty_like(value, device="cpu") for name, value in like.items()}
        unpack(collectives.to_cpu(state), values.values())
        return {name: value.detach() for name, value in values.items()}
