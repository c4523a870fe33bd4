"""The federated algorithms, as a table of what is normalised with what and what is averaged."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from .enums import AlgorithmName, NormName
from .schema import Config


class ParameterGroup(Enum):
    """The parts of a model that algorithms treat differently; every tensor is in one of them."""

    weights = auto()
    """Trainable values outside of BN layers."""
    affine = auto()
    """gamma and beta of BN layers."""
    statistics = auto()
    """Running means, variances and counters of BN layers."""
    buffers = auto()
    """Any other buffer; integer ones stay as they were made."""
    mixing = auto()
    """HBN's d, by which a channel mixes global and batch statistics."""


class Normaliser(Enum):
    """What a BN layer normalises by in a training step that is not synchronised."""

    batch = auto()
    """The client's own batch: ordinary BN."""
    frozen = auto()
    """The running statistics, which stay as they are."""
    running = auto()
    """The round's global statistics, while batch moments move the running ones."""


@dataclass(frozen=True)
class Algorithm:
    """What sets one federated algorithm apart from another; the defaults are FedAvg with BN."""

    norm: NormName = NormName.bn
    """What the network's BN layers become."""
    any_norm: bool = False
    """Whether ``model.norm`` may say otherwise."""
    synchronised_steps: int | None = 0
    """Local steps of a round, from the first, with global BN statistics; None: all."""
    normaliser: Normaliser = Normaliser.batch
    """Of the other steps."""
    later_normaliser: Normaliser | None = None
    """Of the steps from ``algorithm.switch_round`` on, if another."""
    mixes: bool = False
    """Whether BN layers learn to mix the statistics of the normaliser with those of the batch."""
    pooled_gradients: bool = False
    """Whether each synchronised step follows the mean gradient of all clients."""
    private: frozenset[ParameterGroup] = frozenset()
    """Parts that each client keeps to itself; all others are averaged after each round."""


ALGORITHMS = {
    # FedTAN (arXiv 2301.02982): global in the first local step, forward and backward.
    AlgorithmName.fedtan: Algorithm(synchronised_steps=1),
    # FedAvg (McMahan et al. 2017) on networks with BN, group or layer normalization.
    AlgorithmName.fedavg: Algorithm(any_norm=True),
    AlgorithmName.fedavg_gn: Algorithm(norm=NormName.gn),
    AlgorithmName.fedavg_ln: Algorithm(norm=NormName.ln),
    # FedBN (Li et al. 2021): BN layers stay with the client.
    AlgorithmName.fedbn: Algorithm(
        private=frozenset({ParameterGroup.affine, ParameterGroup.statistics})
    ),
    # SiloBN (Andreux et al. 2020): only their statistics do.
    AlgorithmName.silobn: Algorithm(private=frozenset({ParameterGroup.statistics})),
    # FixBN (Zhong et al. 2023): FedAvg, then frozen statistics.
    AlgorithmName.fixbn: Algorithm(later_normaliser=Normaliser.frozen),
    # FBN (Guerraoui et al. 2024): a server-side moving average normalises.
    AlgorithmName.fbn: Algorithm(normaliser=Normaliser.running),
    # HBN (Chen et al. 2025): a learnt mix of it and the batch, each client's own.
    AlgorithmName.hbn: Algorithm(
        normaliser=Normaliser.running, mixes=True, private=frozenset({ParameterGroup.mixing})
    ),
    # One model on the pooled data: large-batch SGD, spread over the ranks.
    AlgorithmName.centralised: Algorithm(
        any_norm=True, synchronised_steps=None, pooled_gradients=True
    ),
    # Each client alone.
    AlgorithmName.singleset: Algorithm(any_norm=True, private=frozenset(ParameterGroup)),
}


@dataclass(frozen=True)
class RoundPlan:
    """What happens in one round."""

    synchronised_steps: int
    pooled_gradients: bool
    normaliser: Normaliser
    averaged: frozenset[ParameterGroup]


def plan(config: Config, round_number: int) -> RoundPlan:
    """What the algorithm, with its options, does in a round."""
    algorithm, options = ALGORITHMS[config.algorithm.name], config.algorithm
    steps = algorithm.synchronised_steps
    if options.synchronised_steps is not None:
        steps = options.synchronised_steps
    if (round_number - 1) % (options.synchronise_every or 1) != 0:
        steps = 0
    normaliser = algorithm.normaliser
    if algorithm.later_normaliser and round_number >= _switch_round(config):
        normaliser = algorithm.later_normaliser
    averaged = set(ParameterGroup) - algorithm.private
    if normaliser is Normaliser.frozen:
        averaged -= {ParameterGroup.statistics}
    return RoundPlan(
        synchronised_steps=config.local_steps if steps is None else steps,
        pooled_gradients=algorithm.pooled_gradients,
        normaliser=normaliser,
        averaged=frozenset(averaged),
    )


def _switch_round(config: Config) -> int:
    """Half of the rounds by default."""
    return config.algorithm.switch_round or max(2, config.rounds // 2 + 1)
