"""Mistakes in the options of the federated algorithm, on clients and server."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .algorithms import ALGORITHMS, Normaliser, ParameterGroup
from .enums import AlgorithmName, CohortMode, GammaName, NormName, ServerOptimizerName
from .errors import format_option_error
from .schema import Config, ServerConfig


def method_mistakes(config: Config) -> Iterator[str]:
    """One line for each."""
    yield from _owned(config)
    yield from _steps(config)
    yield from _norm(config)
    yield from _server(config)
    running = ALGORITHMS[config.algorithm.name].normaliser is Normaliser.running
    if running and config.cohort.mode is CohortMode.stacked:
        allowed = f"auto or sequential with algorithm={config.algorithm.name}"
        yield format_option_error("cohort.mode", "stacked", allowed, "leave it out")


def _owned(config: Config) -> Iterator[str]:
    """Options of one algorithm only."""
    algorithm = config.algorithm
    owners = {
        "synchronised_steps": (algorithm.synchronised_steps, AlgorithmName.fedtan),
        "synchronise_every": (algorithm.synchronise_every, AlgorithmName.fedtan),
        "switch_round": (algorithm.switch_round, AlgorithmName.fixbn),
    }
    for option, (value, owner) in owners.items():
        if value is not None and algorithm.name is not owner:
            allowed = f"null with algorithm={algorithm.name}"
            remedy = f"leave it out or use algorithm={owner}"
            yield format_option_error(f"algorithm.{option}", value, allowed, remedy)


def _steps(config: Config) -> Iterator[str]:
    """Numbers of steps and rounds."""
    algorithm, steps = config.algorithm, config.local_steps
    synchronised = algorithm.synchronised_steps
    if synchronised is not None and not 0 <= synchronised <= max(steps, 1):
        allowed, remedy = f"0 to local_steps, {steps}", "set algorithm.synchronised_steps=1"
        yield format_option_error("algorithm.synchronised_steps", synchronised, allowed, remedy)
    every = algorithm.synchronise_every
    if every is not None and every < 1:
        remedy = "set algorithm.synchronise_every=1"
        yield format_option_error(
            "algorithm.synchronise_every", every, "a whole number >= 1", remedy
        )
    switch = algorithm.switch_round
    if switch is not None and not 2 <= switch <= max(config.rounds, 2):
        allowed = f"2 to rounds, {config.rounds}, for statistics must have moved before they freeze"
        remedy = f"try algorithm.switch_round={max(2, config.rounds // 2)}"
        yield format_option_error("algorithm.switch_round", switch, allowed, remedy)


def _norm(config: Config) -> Iterator[str]:
    """Which layers normalise."""
    own = ALGORITHMS[config.algorithm.name]
    norm = config.model.norm or own.norm
    if norm is not own.norm and not own.any_norm:
        allowed = f"{own.norm} or null with algorithm={config.algorithm.name}"
        remedy = "leave it out or use algorithm=fedavg, centralised or singleset"
        yield format_option_error("model.norm", norm, allowed, remedy)
    if norm is NormName.none and config.model.gamma is not GammaName.ones:
        remedy = "leave it out, for no layer has a gamma"
        yield format_option_error(
            "model.gamma", config.model.gamma, "ones with model.norm=none", remedy
        )
    groups = config.algorithm.groups
    if groups is not None and norm is not NormName.gn:
        allowed = f"null with model.norm={norm}"
        remedy = "leave it out or use algorithm=fedavg_gn"
        yield format_option_error("algorithm.groups", groups, allowed, remedy)
    elif groups is not None and groups < 1:
        yield format_option_error(
            "algorithm.groups", groups, "a whole number >= 1", "try algorithm.groups=2"
        )


def _server(config: Config) -> Iterator[str]:
    """FedProx and FedOpt."""
    server, mu = config.server, config.client.proximal_mu
    if not (math.isfinite(mu) and mu >= 0):
        remedy = "try client.proximal_mu=0.01"
        yield format_option_error("client.proximal_mu", mu, "a finite number >= 0", remedy)
    alone = ALGORITHMS[config.algorithm.name].private == frozenset(ParameterGroup)
    if alone and server.optimizer is not ServerOptimizerName.none:
        allowed = f"none with algorithm={config.algorithm.name}, which averages nothing"
        yield format_option_error("server.optimizer", server.optimizer, allowed, "leave it out")
    yield from _of_optimizer(server)


def _of_optimizer(server: ServerConfig) -> Iterator[str]:
    """Options that the server's optimizer does not use, or of a wrong size."""
    kinds = set(ServerOptimizerName) - {ServerOptimizerName.none}
    squares = kinds - {ServerOptimizerName.momentum}
    users = {"lr": kinds, "momentum": kinds, "beta2": squares, "tau": squares}
    for option, those in users.items():
        value = getattr(server, option)
        if value is None:
            continue
        if server.optimizer not in those:
            allowed = f"null with server.optimizer={server.optimizer}"
            remedy = f"leave it out or choose server.optimizer={sorted(those)[0]}"
            yield format_option_error(f"server.{option}", value, allowed, remedy)
        elif option in ("lr", "tau") and not (math.isfinite(value) and value > 0):
            yield format_option_error(
                f"server.{option}", value, "a finite number > 0", "leave it out"
            )
        elif option in ("momentum", "beta2") and not 0 <= value < 1:
            yield format_option_error(
                f"server.{option}", value, f"0 <= {option} < 1", "leave it out"
            )
