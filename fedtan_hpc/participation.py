"""Who takes part in a round, with which weight, and on which rank: pure, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from . import streams
from .config import ParticipationName


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
    already favoured large clients (Li et al. 2020, On the convergence of FedAvg).
    """
    if clients_per_round is None:
        drawn = list(range(len(shares)))
    else:
        chances = np.asarray(shares) if rule is ParticipationName.weighted else None
        if chances is not None:
            chances = chances / chances.sum()
        rng = streams.generator(streams.PARTICIPATION, seed, round_number)
        drawn = sorted(rng.choice(len(shares), clients_per_round, replace=False, p=chances))
        if rule is ParticipationName.weighted:
            return {int(client): 1 / len(drawn) for client in drawn}
    total = sum(shares[client] for client in drawn)
    return {int(client): shares[client] / total for client in drawn}


def assign(costs: Mapping[int, float], ranks: int) -> list[list[int]]:
    """Share the clients out, so that the heaviest rank is light: each rank's, ascending.

    Longest first to the rank that has least (Graham 1969): best possible for equal costs, and at
    most 4/3 of the best otherwise.  Ties go to the lower client and the lower rank.
    """
    loads = [0.0] * ranks
    hosted: list[list[int]] = [[] for _ in range(ranks)]
    for client in sorted(costs, key=lambda client: (-costs[client], client)):
        rank = loads.index(min(loads))
        loads[rank] += costs[client]
        hosted[rank].append(client)
    return [sorted(clients) for clients in hosted]
