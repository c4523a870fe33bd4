"""The server's step; ``test_methods`` compares its formulas with a re-statement."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedtan_hpc import convert_batchnorm
from fedtan_hpc.config.algorithms import plan
from fedtan_hpc.config.enums import PrecisionName, ServerOptimizerName
from fedtan_hpc.config.schema import ServerConfig
from fedtan_hpc.data.batching import Samples
from fedtan_hpc.data.client_store import Client
from fedtan_hpc.job.setup import host
from fedtan_hpc.training.local_step import RoundContext
from tests.helpers.methods import config
from tests.helpers.rounds import train_round


def shrinking(rounds: int) -> list[tuple[Tensor, Tensor]]:
    """Returns the running variance before and after each round; the round only averages it."""
    torch.manual_seed(0)
    bn = nn.BatchNorm1d(5)
    model = convert_batchnorm(nn.Sequential(nn.Linear(6, 5), bn, nn.Linear(5, 3)))
    options = config("fedavg", server=ServerConfig(optimizer=ServerOptimizerName.momentum))
    options.precision, options.local_steps = PrecisionName.float32, 20
    samples = Samples(0.01 * torch.randn(64, 6), torch.randint(0, 3, (64,)))
    cohort = host(options, model, samples[:1])
    found = []
    variance = bn.running_var
    assert variance is not None
    for number in range(1, rounds + 1):
        before = variance.clone()
        context = RoundContext(number, 0.01, plan(options, number))
        train_round(cohort, [Client(0, 1.0, samples)], context)
        found.append((before, variance.clone()))
    return found


def test_server_momentum_leaves_variances_positive() -> None:
    """Variances fall from 1 to 1e-4; server momentum on them would overshoot below 0."""
    rounds = shrinking(4)
    naive, change = rounds[0][0].clone(), torch.zeros(5)
    lowest = naive.min()
    for _, average in rounds:
        change = 0.9 * change + (average - naive)
        naive = naive + change
        lowest = torch.minimum(lowest, naive.min())
    assert lowest < 0
    assert all(float(after.min()) > 0 for _, after in rounds)
