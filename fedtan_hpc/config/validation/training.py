"""Mistakes in the options of network, algorithm and server that depend on each other.

Used by ``validate``.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from math import inf

from ..algorithms import ALGORITHMS, AUTO, Algorithm, Normaliser, ParameterGroup
from ..enums import CohortMode, GammaName, ModelName, ModelSource, NormName, ServerOptimizerName
from ..errors import format_option_error
from ..schema import Config

_LEAST_PIXELS = 4


def training_mistakes(config: Config) -> Iterator[str]:
    """Yields one line for each mistake."""
    yield from _network(config)
    yield from _steps(config)
    yield from _norm(config)
    yield from _incompatible(config)


def is_import_path(text: str) -> bool:
    """Returns whether ``text`` has the form package.module:callable."""
    module, _, name = text.partition(":")
    return all(word.isidentifier() for path in (module, name) for word in path.split("."))


def own_code_mistakes(
    group: str, is_import: bool, target: str | None, options: object, example: str
) -> Iterator[str]:
    """Yields a line if target or options of the user's code do not fit the choice of ``group``."""
    if is_import and not is_import_path(target or ""):
        value = "null" if target is None else target
        remedy = f"for example {group}.target={example}"
        yield format_option_error(f"{group}.target", value, "package.module:callable", remedy)
    remedy = f"leave it out or use {group}=import"
    if not is_import and target is not None:
        allowed = f"null unless {group}=import"
        yield format_option_error(f"{group}.target", target, allowed, remedy)
    if not is_import and options:
        allowed = f"{{}} unless {group}=import"
        yield format_option_error(f"{group}.options", options, allowed, remedy)


def _network(config: Config) -> Iterator[str]:
    model = config.model
    is_import, example = model.source is ModelSource.import_, "my_networks:small_net"
    yield from own_code_mistakes("model", is_import, model.target, {}, example)
    if config.model.small_input and config.model.source is not ModelSource.torchvision:
        allowed, remedy = "false unless model=torchvision", "leave it out or use model=torchvision"
        yield format_option_error("model.small_input", "true", allowed, remedy)
    weights = config.model.weights
    if weights is not None and not weights.strip():
        allowed, remedy = "the name of a file, or null", "name a file or leave it out"
        yield format_option_error("model.weights", weights, allowed, remedy)
    if config.model.source is ModelSource.builtin:
        yield from _builtin(config)


def _builtin(config: Config) -> Iterator[str]:
    name, names = config.model.name, [str(choice) for choice in ModelName]
    if name not in names:
        near = [f"use model={close}" for close in get_close_matches(name, names, n=1)]
        remedy = ", or ".join([*near, f"for torchvision's model=torchvision model.name={name}"])
        yield format_option_error("model.name", name, " | ".join(names), remedy)
        return
    if config.data.is_own:
        return
    shape = config.data.info().shape
    if name != ModelName.mlp and len(shape) == 3 and min(shape[1:]) < _LEAST_PIXELS:
        allowed = f"{_LEAST_PIXELS} pixels or more in both directions with model={name}"
        remedy = "use larger samples or model=mlp"
        yield format_option_error("data.shape", list(shape), allowed, remedy)


def _steps(config: Config) -> Iterator[str]:
    steps, switch = config.algorithm.synchronised_steps, config.algorithm.switch_round
    most = inf if config.local_epochs else max(config.local_steps, 1)  # then clients decide
    if steps is not None and not 0 <= steps <= most:
        allowed = f"0 to local_steps, {config.local_steps}"
        option = "algorithm.synchronised_steps"
        yield format_option_error(option, steps, allowed, f"set {option}=1")
    if switch is not None and not 2 <= switch <= max(config.rounds, 2):
        allowed = f"2 to rounds, {config.rounds}, because statistics must move before they freeze"
        remedy = f"try algorithm.switch_round={max(2, config.rounds // 2)}"
        yield format_option_error("algorithm.switch_round", switch, allowed, remedy)


def _norm(config: Config) -> Iterator[str]:
    algorithm, groups = ALGORITHMS[config.algorithm.name], config.algorithm.groups
    norm = config.model.norm or algorithm.norm
    if norm is not algorithm.norm and not algorithm.any_norm:
        allowed = f"{algorithm.norm} or null with algorithm={config.algorithm.name}"
        remedy = "leave it out or use algorithm=fedavg, centralised or singleset"
        yield format_option_error("model.norm", norm, allowed, remedy)
    if norm is NormName.none and config.model.gamma is not GammaName.ones:
        allowed, remedy = "ones with model.norm=none", "leave it out, because no layer has a gamma"
        yield format_option_error("model.gamma", config.model.gamma, allowed, remedy)
    if groups is not None and norm is not NormName.gn:
        allowed, remedy = f"null with model.norm={norm}", "leave it out or use algorithm=fedavg_gn"
        yield format_option_error("algorithm.groups", groups, allowed, remedy)


def can_be_probed(config: Config) -> bool:
    """Returns whether BN layers normalise by statistics of batches, which a probe compares."""
    algorithm = ALGORITHMS[config.algorithm.name]
    is_bn = (config.model.norm or algorithm.norm) is NormName.bn
    return is_bn and _is_by_batch(algorithm)


def _is_by_batch(algorithm: Algorithm) -> bool:
    return algorithm.normaliser is Normaliser.batch and algorithm.later_normaliser is None


def _several_ranks(config: Config) -> Iterator[str]:
    """Checks choices that a client on several ranks does not allow."""
    if config.ranks_per_client == 1:
        return
    algorithm, where = config.algorithm, f"ranks_per_client={config.ranks_per_client}"
    if ALGORITHMS[algorithm.name].normaliser is Normaliser.running:
        allowed, remedy = f"none of fbn and hbn with {where}", "use another, or ranks_per_client=1"
        yield format_option_error("algorithm", algorithm.name, allowed, remedy)
    refused = {
        "compile": ("true", config.compile, "false"),
        "cohort.mode": ("stacked", config.cohort.mode is CohortMode.stacked, "auto or sequential"),
        "probe.every": (config.probe.every, config.probe.every is not None, "null"),
        "algorithm.layers": (AUTO, algorithm.layers == AUTO, "all or a list of names"),
        "algorithm.synchronise_every": (AUTO, algorithm.synchronise_every == AUTO, "a number"),
    }
    for option, (value, is_set, instead) in refused.items():
        if is_set:
            yield format_option_error(option, value, f"{instead} with {where}", "leave it out")


def _probe(config: Config) -> Iterator[str]:
    """A probe compares statistics of batches: local ones with global ones."""
    algorithm = ALGORITHMS[config.algorithm.name]
    norm = config.model.norm or algorithm.norm
    if config.probe.every is not None and not can_be_probed(config):
        where = f"algorithm={config.algorithm.name}"
        where += "" if norm is NormName.bn else f" and model.norm={norm}"
        remedy = "leave it out, because no layer has statistics of its batch"
        if not _is_by_batch(algorithm):
            remedy = "leave it out or use algorithm=fedavg, fedbn, silobn, fedtan or centralised"
        yield format_option_error("probe.every", config.probe.every, f"null with {where}", remedy)


def _incompatible(config: Config) -> Iterator[str]:
    """Checks choices that the algorithm does not allow."""
    name, optimizer = config.algorithm.name, config.server.optimizer
    averages = ALGORITHMS[name].private != frozenset(ParameterGroup)
    if not averages and optimizer is not ServerOptimizerName.none:
        allowed = f"none with algorithm={name}, which averages nothing"
        yield format_option_error("server.optimizer", optimizer, allowed, "leave it out")
    yield from _probe(config)
    yield from _several_ranks(config)
    running = ALGORITHMS[name].normaliser is Normaliser.running
    if running and config.cohort.mode is CohortMode.stacked:
        allowed = f"auto or sequential with algorithm={name}"
        yield format_option_error("cohort.mode", "stacked", allowed, "leave it out")
