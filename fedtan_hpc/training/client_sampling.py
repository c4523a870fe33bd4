"""Who takes part in a round, with which weight, and on which rank: pure, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..config.enums import ParticipationName
from ..runtime import random_streams


def draw(
    shares: Sequence[float],
    clients_per_round: int | None,
    rule: ParticipationName,
    seed: int,
    round_number: int,
) -> dict[int, float]:
    """The weight of each participant of a round, by ascending client; they sum to 1.

    ``shares`` are the clients' p_k.  With ``clients_per_round`` (all if None) participants are
    drawn without replacement, from (seed, round) alone.  Uniform: with equal chances, and weighted
    with p_k over their sum.  Weighted: with chances p_k, and equal weights, for the draw has
    already favoured large clients; as nobody is drawn twice, very large ones count for less than
    their share.
    """
    if clients_per_round is None:
        drawn = list(range(len(shares)))
    else:
        chances = np.asarray(shares) if rule is ParticipationName.weighted else None
        if chances is not None:
            chances = chances / chances.sum()
        rng = random_streams.generator(random_streams.PARTICIPATION, seed, round_number)
        drawn = sorted(rng.choice(len(shares), clients_per_round, replace=False, p=chances))
        if rule is ParticipationName.weighted:
            return {int(client): 1 / len(drawn) for client in drawn}
    total = sum(shares[client] for client in drawn)
    return {int(client): shares[client] / total for client in drawn}


def assign(costs: Mapping[int, float], ranks: int) -> list[list[int]]:
    """Share the clients out, so that the heaviest rank is as light as can be found.

    Longest first to the rank that has least (Graham 1969; at most 4/3 of the best), then swaps that
    relieve the heaviest rank.  Best possible for equal costs.  Ties go to the lower client and the
    lower rank, so that every rank finds the same.
    """
    loads = [0.0] * ranks
    hosted: list[list[int]] = [[] for _ in range(ranks)]
    for client in sorted(costs, key=lambda client: (-costs[client], client)):
        rank = loads.index(min(loads))
        loads[rank] += costs[client]
        hosted[rank].append(client)
    if len(set(costs.values())) > 1:
        while _relieve(hosted, loads, costs):
            pass
    return [sorted(clients) for clients in hosted]


def _relieve(hosted: list[list[int]], loads: list[float], costs: Mapping[int, float]) -> bool:
    """Swap a client of the heaviest rank with a cheaper one of another, if both end below it."""
    heavy = loads.index(max(loads))
    for light in sorted(range(len(loads)), key=lambda rank: loads[rank]):
        for mine in hosted[heavy]:
            for other in hosted[light]:
                gain = costs[mine] - costs[other]
                if gain > 0 and loads[light] + gain < loads[heavy]:
                    hosted[heavy][hosted[heavy].index(mine)] = other
                    hosted[light][hosted[light].index(other)] = mine
                    loads[heavy] -= gain
                    loads[light] += gain
                    return True
    return False
