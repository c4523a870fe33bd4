"""The federated algorithms as a table: what normalises, and what is averaged.

``plan`` turns a row and the options into the plan of one round.  Used by
``validation`` and by the rooms ``models``, ``training`` and ``job``.
"""

from dataclasses import dataclass
from enum import Enum, auto

from .enums import AlgorithmName, NormName
from .schema import Config
from .schema_training import AlgorithmConfig

ALL, AUTO = "all", "auto"
"""Words in place of the names of layers, and of a number of rounds: the probe decides."""
FRACTION, CHOOSING_ROUNDS, DEVIATION_LIMIT = 0.5, 3, 0.5
"""Defaults of three options of ``algorithm``."""


class ParameterGroup(Enum):
    """Groups of a model's tensors that algorithms treat differently; each tensor is in one."""

    weights = auto()
    """Trainable parameters outside of BN layers."""
    affine = auto()
    """gamma and beta of BN layers."""
    statistics = auto()
    """Running means, variances and counters of BN layers."""
    buffers = auto()
    """Other buffers; integer buffers never change."""
    mixing = auto()
    """HBN's d, which weights global against batch statistics in each channel."""


class Normaliser(Enum):
    """Statistics by which a BN layer normalises in a local step that is not synchronised."""

    batch = auto()
    """Statistics of the client's batch: ordinary BN."""
    frozen = auto()
    """Running statistics, which do not change."""
    running = auto()
    """Global statistics of the round; batch moments update the running statistics."""


@dataclass(frozen=True)
class Algorithm:
    """One federated algorithm; the defaults describe FedAvg with BN."""

    norm: NormName = NormName.bn
    """Replacement for the network's BN layers."""
    any_norm: bool = False
    """Whether the option ``model.norm`` may choose another replacement."""
    synchronised_steps: int | None = 0
    """Local steps with global statistics, from a round's first; None: all steps."""
    normaliser: Normaliser = Normaliser.batch
    """Normaliser in the other steps."""
    later_normaliser: Normaliser | None = None
    """Normaliser from the round ``algorithm.switch_round`` on, if it differs."""
    mixes: bool = False
    """Whether BN layers learn to mix the normaliser's statistics with the batch statistics."""
    pooled_gradients: bool = False
    """Whether a synchronised step follows the mean gradient of all clients."""
    private: frozenset[ParameterGroup] = frozenset()
    """Groups that each client keeps for itself; a round ends with the average of the others."""

    @property
    def has_client_models(self) -> bool:
        """Whether each client has a model of its own, not only in training."""
        return bool(self.private - {ParameterGroup.mixing})


ALGORITHMS = {
    # FedTAN (arXiv 2301.02982): the first local step is global, forward and backward.
    AlgorithmName.fedtan: Algorithm(synchronised_steps=1),
    # FedAvg (McMahan et al. 2017) with BN, group normalization or layer normalization.
    AlgorithmName.fedavg: Algorithm(any_norm=True),
    AlgorithmName.fedavg_gn: Algorithm(norm=NormName.gn),
    AlgorithmName.fedavg_ln: Algorithm(norm=NormName.ln),
    # FedBN (Li et al. 2021): clients keep their BN layers.
    AlgorithmName.fedbn: Algorithm(
        private=frozenset({ParameterGroup.affine, ParameterGroup.statistics})
    ),
    # SiloBN (Andreux et al. 2020): clients keep the statistics of their BN layers.
    AlgorithmName.silobn: Algorithm(private=frozenset({ParameterGroup.statistics})),
    # FixBN (Zhong et al. 2023): FedAvg, later with frozen statistics.
    AlgorithmName.fixbn: Algorithm(later_normaliser=Normaliser.frozen),
    # FBN (Guerraoui et al. 2024): the server's moving average normalises.
    AlgorithmName.fbn: Algorithm(normaliser=Normaliser.running),
    # HBN (Chen et al. 2025): each client learns to mix that average with its batch statistics.
    AlgorithmName.hbn: Algorithm(
        normaliser=Normaliser.running, mixes=True, private=frozenset({ParameterGroup.mixing})
    ),
    # Large-batch training of one model on the pooled data, distributed over the ranks.
    AlgorithmName.centralised: Algorithm(
        any_norm=True, synchronised_steps=None, pooled_gradients=True
    ),
    # Each client trains alone.
    AlgorithmName.singleset: Algorithm(any_norm=True, private=frozenset(ParameterGroup)),
}


@dataclass(frozen=True)
class RoundPlan:
    """The algorithm's behaviour in one round; the fields mean the same as in ``Algorithm``."""

    synchronised_steps: int
    pooled_gradients: bool
    normaliser: Normaliser
    averaged: frozenset[ParameterGroup]
    """Groups that are averaged after the round."""
    layers: frozenset[str] | None = None
    """Names of the BN layers with global statistics in synchronised steps; None: all."""


def synchronised_layers(options: AlgorithmConfig) -> str | list[str]:
    """Returns ``ALL``, ``AUTO``, or patterns of the names of BN layers."""
    if isinstance(options.layers, list):
        return [str(each) for each in options.layers]  # such as 2, a layer of a Sequential
    return ALL if options.layers is None else str(options.layers)


def plan(config: Config, round_number: int) -> RoundPlan:
    """Returns the plan of round ``round_number``, counted from 1, for the chosen algorithm.

    What a probe decides is left out: all rounds and layers are synchronised.
    """
    options, algorithm = config.algorithm, ALGORITHMS[config.algorithm.name]
    steps = algorithm.synchronised_steps
    if options.synchronised_steps is not None:
        steps = options.synchronised_steps
    every = 1 if options.synchronise_every in (None, AUTO) else options.synchronise_every
    if (round_number - 1) % every != 0:
        steps = 0
    normaliser = algorithm.normaliser
    switch_round = options.switch_round or max(2, config.rounds // 2 + 1)
    if algorithm.later_normaliser and round_number >= switch_round:
        normaliser = algorithm.later_normaliser
    averaged = frozenset(ParameterGroup) - algorithm.private
    if normaliser is Normaliser.frozen:
        averaged -= {ParameterGroup.statistics}
    steps = config.local_steps if steps is None else steps
    return RoundPlan(steps, algorithm.pooled_gradients, normaliser, averaged)


def mixes_batches(config: Config) -> bool:
    """Returns whether no BN layer ever normalises by the statistics of one client's batch."""
    options = config.algorithm
    may_be_local = synchronised_layers(options) != ALL or options.synchronise_every == AUTO
    rounds = {1, min(2, config.rounds), config.rounds}
    return not any(
        each.normaliser is Normaliser.batch
        and (may_be_local or each.synchronised_steps < config.local_steps)
        for each in (plan(config, number) for number in rounds)
    )
