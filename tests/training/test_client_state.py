"""Private states stay with their clients while these move between ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fedtan_hpc.config.algorithms import ALGORITHMS, ParameterGroup
from fedtan_hpc.config.schema import Config
from fedtan_hpc.job.setup import prepare
from fedtan_hpc.models.parameter_groups import groups_of
from fedtan_hpc.training.client_state import PrivateStates
from tests.helpers.methods import all_states, config
from tests.helpers.ranks import on_ranks
from tests.helpers.restated import State
from tests.helpers.rounds import CPU


def states_by_round(
    options: Config,
) -> list[tuple[list[int], dict[int, State], State, list[int | None]]]:
    """Returns after each round: drawn clients, private states, global model, rank of each state."""
    trainer = prepare(options, CPU)
    states = trainer.cohort.states
    found = []
    for number in range(1, options.rounds + 1):
        trainer.round(number)
        drawn = list(trainer._participants(number))
        own = all_states(trainer)
        owners = [states.owners.get(client) for client in range(options.clients)]
        found.append((drawn, own, copy.deepcopy(trainer.model.state_dict()), owners))
    return found


@pytest.mark.parametrize("method", ["fedbn", "silobn", "hbn", "singleset"])
def test_what_is_private_stays_private_and_what_is_shared_is_equal(method: str) -> None:
    options = config(method, rounds=6, clients=5, clients_per_round=2, local_steps=1)
    private = ALGORITHMS[options.algorithm.name].private
    ranks = on_ranks(2, states_by_round, options)
    parts = groups_of(prepare(options, CPU).model)
    owners = set()
    for number, (drawn, own, shared, where) in enumerate(ranks[0]):
        assert all(parts[name] in private for values in own.values() for name in values)
        owners.add(where[drawn[0]])
        for name, value in ranks[1][number][2].items():
            assert torch.equal(value, shared[name])
            if parts[name] in private:
                assert torch.equal(value, ranks[0][0][2][name])
        if number:
            for client, values in own.items():
                same = [
                    torch.equal(v, ranks[0][number - 1][1][client][n]) for n, v in values.items()
                ]
                assert all(same) if client not in drawn else not all(same)
    moved = [
        client
        for client in range(5)
        if len({rounds[3][client] for rounds in ranks[0]} - {None}) > 1
    ]
    assert moved, "no client's state went to another rank"


def test_states_that_do_not_fit_on_the_device_are_kept_on_the_host() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    asked = []

    def fits(more: int) -> bool:
        asked.append(more)
        return False

    states = PrivateStates(model, {ParameterGroup.statistics}, fits)
    states.save(0, model)
    assert asked == []  # on a CPU there is nothing to choose

    class OnGpu(Tensor):
        is_cuda = True

        def cpu(self, *_: object) -> Tensor:
            return torch.zeros(7)

    states._store(1, torch.ones(7).as_subclass(OnGpu))
    assert asked == [28]
    states.load(1, model)
    running_mean = model[1].running_mean
    assert isinstance(running_mean, Tensor)
    assert running_mean.tolist() == [0.0, 0.0, 0.0]
