"""Which clients take part in a round, with which weight and on which rank.

Pure functions: every rank gets the same result without asking others.  Used by ``job.trainer``.
"""

from collections.abc import Mapping, Sequence
from itertools import product

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
    """Returns the weight of each participant by client, ascending; the weights sum to 1.

    ``shares`` are the clients' p_k.  ``clients_per_round`` clients (None: all) are drawn without
    replacement; the draw depends on seed and round alone.  uniform: equal chances, and weights p_k
    over their sum.  weighted: chances p_k and equal weights, because the draw favours large
    clients; no client is drawn twice, so a very large client counts less than its share.
    """
    if clients_per_round is None:
        drawn = list(range(len(shares)))
    else:
        is_weighted = rule is ParticipationName.weighted
        chances = np.asarray(shares) / np.sum(shares) if is_weighted else None
        rng = random_streams.generator(random_streams.PARTICIPATION, seed, round_number)
        drawn = sorted(rng.choice(len(shares), clients_per_round, replace=False, p=chances))
        if is_weighted:
            return {int(client): 1 / len(drawn) for client in drawn}
    total = sum(shares[client] for client in drawn)
    return {int(client): shares[client] / total for client in drawn}


def assign(costs: Mapping[int, float], ranks: int) -> list[list[int]]:
    """Assigns the clients to ranks and keeps the largest load small; returns clients by rank.

    The longest client goes first, to the rank with the least load (Graham 1969; at most 4/3 of the
    optimum); then swaps reduce the largest load.  Optimal for equal costs.  Ties go to the lower
    client and the lower rank.
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
    """Swaps a client of the busiest rank for a cheaper one; returns False if no swap helps."""
    busiest = loads.index(max(loads))
    for rank in sorted(range(len(loads)), key=lambda rank: loads[rank]):
        for large, small in product(hosted[busiest], hosted[rank]):
            gain = costs[large] - costs[small]
            if gain > 0 and loads[rank] + gain < loads[busiest]:
                hosted[busiest][hosted[busiest].index(large)] = small
                hosted[rank][hosted[rank].index(small)] = large
                loads[busiest] -= gain
                loads[rank] += gain
                return True
    return False
