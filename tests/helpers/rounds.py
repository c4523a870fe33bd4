"""A round of local training and averaging, as the trainer's loop runs it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedtan_hpc.data.client_store import Client
from fedtan_hpc.training.cohort import Cohort
from fedtan_hpc.training.local_step import RoundContext


def train_round(cohort: Cohort, clients: Sequence[Client], context: RoundContext) -> list[Tensor]:
    """Trains this rank's clients, averages the models and returns the clients' losses."""
    model_sum = cohort.begin_round(context)
    losses = cohort.runner.run(clients, context, model_sum)
    cohort.end_round(model_sum)
    return losses
