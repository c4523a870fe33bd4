"""The network, tried out before any data loads: made, converted and run on two samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..batchnorm.layer import convert_batchnorm
from ..config.algorithms import ALGORITHMS, Algorithm, Normaliser, ParameterGroup
from ..config.enums import CohortMode, ModelSource, NormName
from ..config.errors import ConfigError, format_option_error, one_line
from ..config.schema import Config
from ..models import factory
from ..models.norms import with_norm_of
from ..training.vmap_clients import vmap_error

_SAMPLES = 2
_FEDAVG = "use algorithm=fedavg, or a network with BN layers"


def dry_run(config: Config) -> None:
    """Make the network of ``config`` and run it once in training mode, without data.

    torchvision's are made and run without memory for tensors (device meta).  The process's random
    state is left as it was.

    Raises ``ConfigError`` if the network cannot be made, does not take the samples, gives no class
    scores, or lacks the BN layers that the algorithm is about.
    """
    with torch.random.fork_rng(devices=[]):
        module = _make(config)
        _check_complete(config, module)
        _check_batchnorm(config, module)
        module = _converted(config, module)
        _run(config, module)
        _stack(config, module)


def _make(config: Config) -> nn.Module:
    """On the CPU or, as it may be large, on meta."""
    facts = config.data.facts()
    if config.model.source is not ModelSource.torchvision:
        return factory.build(config.model, facts.shape, facts.classes, config.seed)
    try:
        with torch.device("meta"):
            return factory.build(config.model, facts.shape, facts.classes, config.seed)
    except NotImplementedError:  # RegNets compute their widths with tensors
        return factory.build(config.model, facts.shape, facts.classes, config.seed).to("meta")


def _check_complete(config: Config, module: nn.Module) -> None:
    """Whether there are parameters to train, all of them of a known size."""
    if any(is_lazy(value) for value in (*module.parameters(), *module.buffers())):
        remedy = "run one batch through it before it is returned"
        raise ConfigError(_of_network(config, "a network without lazy layers", remedy))
    if not any(parameter.requires_grad for parameter in module.parameters()):
        remedy = "return one that has parameters"
        raise ConfigError(_of_network(config, "a network that can be trained", remedy))


def _check_batchnorm(config: Config, module: nn.Module) -> None:
    """Whether there are the BN layers that the algorithm is about, or that are to be converted."""
    name, own, norm = config.algorithm.name, ALGORITHMS[config.algorithm.name], config.model.norm
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    if not layers and (_needs_batchnorm(own) or own.norm is not NormName.bn):
        allowed, remedy = "one that does without BN layers, for the network has none", _FEDAVG
        raise ConfigError(format_option_error("algorithm.name", name, allowed, remedy))
    if not layers and norm in (NormName.gn, NormName.ln):
        allowed = "null, for the network has no BN layers to convert"
        remedy = "leave it out, or use a network with BN layers"
        raise ConfigError(format_option_error("model.norm", norm, allowed, remedy))
    stays = (norm or own.norm) is NormName.bn
    if stays and any(layer.running_mean is None for layer in layers):
        allowed = "a network whose BN layers keep running statistics"
        remedy = "else it would be judged by how the test set falls into batches"
        raise ConfigError(_of_network(config, allowed, remedy))


def _needs_batchnorm(algorithm: Algorithm) -> bool:
    """Whether it differs from FedAvg only by what it does with BN layers."""
    of_layers = {
        ParameterGroup.affine,
        ParameterGroup.statistics,
        ParameterGroup.mixing,
    } & algorithm.private
    return (
        (algorithm.synchronised_steps != 0 and not algorithm.pooled_gradients)
        or (bool(of_layers) and ParameterGroup.weights not in algorithm.private)
        or _uses_running(algorithm)
        or algorithm.mixes
    )


def _uses_running(algorithm: Algorithm) -> bool:
    """Whether training steps normalise by running statistics."""
    return algorithm.normaliser is not Normaliser.batch or algorithm.later_normaliser is not None


def _converted(config: Config, module: nn.Module) -> nn.Module:
    """The network with the normalization layers of the algorithm."""
    module = with_norm_of(config, module)
    try:
        return convert_batchnorm(module)
    except ValueError as error:
        allowed = "a network whose BN layers can be converted"
        raise ConfigError(_of_network(config, allowed, one_line(error))) from error


def _run(config: Config, module: nn.Module) -> None:
    """Class scores of two samples, in training mode."""
    shape, classes = config.data.facts().shape, config.data.facts().classes
    device = next(module.parameters()).device
    samples = torch.zeros(_SAMPLES, *shape, device=device)
    for layer in module.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.register_forward_pre_hook(_check_group)
    try:
        scores = module.to(samples).train()(samples)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        allowed = f"a network that takes samples of shape {shape}"
        stem = "model.small_input=true, " if _has_large_stem(config) else ""
        remedy = f"use {stem}other samples or another network: {one_line(error)}"
        raise ConfigError(_of_network(config, allowed, remedy)) from error
    if not isinstance(scores, Tensor) or scores.shape != (_SAMPLES, classes):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        allowed = f"a network whose output for {_SAMPLES} samples is ({_SAMPLES}, {classes})"
        remedy = f"use another, for the output of this one is {found}"
        raise ConfigError(_of_network(config, allowed, remedy))


def _stack(config: Config, module: nn.Module) -> None:
    """Two clients at once, if that is asked for and the network is one of the user's own."""
    stacked = config.cohort.mode is CohortMode.stacked
    if not stacked or config.model.source is not ModelSource.target:
        return
    if error := vmap_error(module, torch.zeros(1, *config.data.facts().shape)):
        allowed = "auto or sequential, for clients of the network cannot be stacked"
        remedy = f"leave it out: {one_line(error)}"
        raise ConfigError(format_option_error("cohort.mode", "stacked", allowed, remedy))


def _check_group(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """A group of one value becomes 0 whatever the value is."""
    assert isinstance(layer, nn.GroupNorm)
    values = inputs[0][0].numel() // layer.num_groups
    if values < 2:
        allowed = f"fewer groups, for one of {layer.num_channels} channels would have one value"
        remedy = f"try algorithm.groups={max(1, layer.num_groups // 2)}"
        raise ConfigError(
            format_option_error("algorithm.groups", layer.num_groups, allowed, remedy)
        )


def _has_large_stem(config: Config) -> bool:
    return config.model.source is ModelSource.torchvision and not config.model.small_input


def _of_network(config: Config, allowed: str, remedy: str) -> str:
    """A mistake of the option that chose the network."""
    if config.model.source is ModelSource.target:
        return format_option_error("model.target", config.model.target, allowed, remedy)
    return format_option_error("model.name", config.model.name, allowed, remedy)
