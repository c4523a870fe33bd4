"""Which clients take part, and on which rank: pure functions of round and seed."""

from __future__ import annotations

import itertools
import random

import pytest

from fedtan_hpc.config.enums import ParticipationName
from fedtan_hpc.training.client_sampling import assign, draw

SHARES = [0.1, 0.4, 0.2, 0.05, 0.25]


@pytest.mark.parametrize("rule", ParticipationName)
def test_all_take_part_by_default_with_their_shares(rule: ParticipationName) -> None:
    assert draw(SHARES, None, rule, 0, 1) == pytest.approx(dict(enumerate(SHARES)))


@pytest.mark.parametrize("rule", ParticipationName)
def test_a_draw_depends_on_seed_and_round_alone(rule: ParticipationName) -> None:
    shares = [1 / 100] * 100
    first = draw(shares, 10, rule, 0, 1)
    assert first == draw(shares, 10, rule, 0, 1)
    assert list(first) == sorted(first)
    assert len(first) == 10
    assert set(first) != set(draw(shares, 10, rule, 0, 2))
    assert set(first) != set(draw(shares, 10, rule, 1, 1))


def test_uniform_weights_are_the_shares_renormalised() -> None:
    weights = draw(SHARES, 3, ParticipationName.uniform, 0, 1)
    total = sum(SHARES[client] for client in weights)
    assert weights == pytest.approx({client: SHARES[client] / total for client in weights})


def test_weighted_draws_favour_large_clients_and_weigh_them_equally() -> None:
    drawn = [draw(SHARES, 1, ParticipationName.weighted, 0, number) for number in range(400)]
    assert all(list(weights.values()) == [1.0] for weights in drawn)
    counts = [sum(client in weights for weights in drawn) / 400 for client in range(5)]
    assert counts == pytest.approx(SHARES, abs=0.08)


def test_uniform_draws_do_not() -> None:
    drawn = [draw(SHARES, 1, ParticipationName.uniform, 0, number) for number in range(400)]
    counts = [sum(client in weights for weights in drawn) / 400 for client in range(5)]
    assert counts == pytest.approx([0.2] * 5, abs=0.08)


def heaviest(costs: dict[int, float], ranks: int) -> float:
    return max(sum(costs[client] for client in hosted) for hosted in assign(costs, ranks))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_every_client_has_one_rank(ranks: int) -> None:
    costs = {client: 1.0 + client % 3 for client in range(5)}
    hosted = assign(costs, ranks)
    assert len(hosted) == ranks
    assert sorted(itertools.chain(*hosted)) == list(range(5))
    assert hosted == assign(dict(reversed(costs.items())), ranks)


@pytest.mark.parametrize(("clients", "ranks"), [(5, 2), (10, 3), (100, 8), (3, 5)])
def test_equal_clients_are_spread_evenly(clients: int, ranks: int) -> None:
    assert heaviest(dict.fromkeys(range(clients), 32.0), ranks) == 32 * -(-clients // ranks)


def test_the_heaviest_rank_is_within_four_thirds_of_the_best() -> None:
    rng = random.Random(0)
    for _ in range(50):
        costs = {client: rng.uniform(1, 32) for client in range(7)}
        best = min(
            max(
                sum(c for c, r in zip(costs.values(), way, strict=True) if r == k)
                for k in (0, 1, 2)
            )
            for way in itertools.product(range(3), repeat=7)
        )
        assert heaviest(costs, 3) <= 4 / 3 * best + 1e-9


def test_swaps_mend_what_longest_first_leaves() -> None:
    assert heaviest({0: 3, 1: 3, 2: 2, 3: 2, 4: 2}, 2) == 6
