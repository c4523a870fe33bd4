"""The federated algorithms, as a table of what is normalised with what."""

from __future__ import annotations

from dataclasses import dataclass

from .config import AlgorithmName


@dataclass(frozen=True)
class Algorithm:
    """What sets one federated algorithm apart from another.

    Parameters and running statistics are averaged after each round, with weights p_k.
    """

    synchronised_steps: int
    """How many of a round's local steps, from the first, have global BN statistics."""


ALGORITHMS = {
    # FedTAN (arXiv 2301.02982): global in the first local step, forward and backward.
    AlgorithmName.fedtan: Algorithm(synchronised_steps=1),
    # FedAvg (McMahan et al. 2017) on networks with BN: always the local batch.
    AlgorithmName.fedavg: Algorithm(synchronised_steps=0),
}
