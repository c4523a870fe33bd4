"""Where the time of a round goes: computing, carrying statistics and models, and waiting.

A rank that comes late to a collective does not wait in it, so the least time that any rank spends
in a round's collectives is what carrying takes; what others spend beyond it they wait for the
slowest.  On a GPU collectives are timed by events in its stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed import collectives
from ..evaluation.records import RoundRecord

NAMES = ("compute", "statistics", "average", "waiting", "evaluation")


def phases(records: Sequence[RoundRecord], device: torch.device) -> dict[str, float]:
    """Seconds of a round by phase: means over the ranks, medians over this process's ``records``.

    Every rank calls it, with its own records of the same rounds.
    """
    rows = [
        (each.round_seconds, each.statistics_seconds, each.average_seconds, each.evaluation_seconds)
        for each in records
    ]
    own_R4 = torch.tensor(rows, dtype=torch.float64, device=device).view(-1, 4)
    by_rank_PR4 = collectives.to_cpu(torch.stack(collectives.all_gather(own_R4)))
    middle = _by_phase(by_rank_PR4).median(0).values if rows else torch.zeros(len(NAMES))
    return dict(zip(NAMES, middle.tolist(), strict=True))


def _by_phase(times_PR4: Tensor) -> Tensor:
    """Means over ranks, (rounds, phases)."""
    whole, statistics, average, evaluation = times_PR4.unbind(-1)
    compute = whole - statistics - average
    carried = (statistics + average).amin(0)
    waiting = (statistics + average - carried).mean(0)
    share = torch.where(carried > 0, statistics.mean(0) / (statistics + average).mean(0), 0.0)
    columns = [compute.mean(0), carried * share, carried * (1 - share), waiting]
    return torch.stack([*columns, evaluation.mean(0)], dim=-1)
