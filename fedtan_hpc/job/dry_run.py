"""Makes, converts and runs the network on two samples before any data loads.  Used by ``run``."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from ..batchnorm.conversion import batchnorm_layers, convert_batchnorm
from ..config.algorithms import ALGORITHMS, Algorithm, Normaliser, ParameterGroup, mixes_batches
from ..config.enums import CohortMode, ModelSource, NormName, TaskName
from ..config.errors import ConfigError, format_option_error, one_line
from ..config.schema import Config
from ..data.batching import Dataset, Samples
from ..data.own.items import DataError
from ..data.own.shared import unreadable
from ..models import factory, weights
from ..models.copies import copy_error
from ..models.freezing import freeze
from ..models.norms import with_norm_of
from ..models.outputs import applied
from ..probing.schedule import Schedule
from ..runtime import global_random
from ..tasks.objective import Objective
from ..training.client_runners import needs_copies
from ..training.local_step import Loss, set_training_mode
from ..training.stacked.vmap_trial import vmap_error

_SAMPLES = 2
_FEDAVG = "use algorithm=fedavg, or a network with BN layers"


@dataclass(frozen=True)
class Example:
    """Two samples on which a network is tried, and the number of classes."""

    samples: Samples
    shape: Any
    """Shape of a sample, for messages and for the user's function that makes the network."""
    classes: int

    @classmethod
    def of(cls, config: Config, dataset: Dataset | None) -> "Example":
        """Returns two samples of the user's data, or zeros like those of a built-in data set."""
        if dataset is not None:
            indices = dataset.train[[0, -1]]
            try:
                samples = dataset.take(indices)
            except DataError as error:
                raise unreadable(config.data, error) from error
            return cls(samples, dataset.shape, dataset.classes)
        info = config.data.info()
        labels = torch.zeros(_SAMPLES, dtype=torch.int64)
        samples = Samples(torch.zeros(_SAMPLES, *info.shape), labels)
        return cls(samples, info.shape, info.classes)


def dry_run(config: Config, ranks: int = 1, dataset: Dataset | None = None) -> list[str]:
    """Makes the network of ``config`` and runs it, for a job of so many ``ranks``.

    It runs on zeros, unless ``dataset`` is given, the user's.

    Networks of torchvision run on the meta device, which needs no memory for tensors.  The random
    state of the process stays unchanged.

    Returns lines that say how the job uses the network, where that is not plain.

    Raises ``ConfigError`` if the network cannot be made, does not take the samples, returns no
    scores, lacks the BN layers that the algorithm needs, cannot be stacked or copied where
    that is needed, or does not fit ``model.weights`` or ``model.freeze``.
    """
    with global_random.preserved():
        example = Example.of(config, dataset)
        _check_class_weights(config, example)
        module = _make(config, example)
        _check_parameters(config, module)
        _check_not_scripted(config, module)
        _check_batchnorm(config, module)
        module = with_norm_of(config, module)
        try:
            module = convert_batchnorm(module)
        except ValueError as error:
            allowed = "a network whose BN layers can be converted"
            raise _network_error(config, allowed, one_line(error)) from error
        told = [weights.load(module, config.model.weights)] if config.model.weights else []
        module = freeze(module, config.model.freeze)
        Schedule(config, list(batchnorm_layers(module)))  # finds names that no BN layer has
        description = _check_run(config, module, example)
        _check_stack(config, module, example)
        _check_copies(config, module, ranks)
    return [*([description] if description else []), *told]


def _make(config: Config, example: Example) -> nn.Module:
    shape, classes = example.shape, example.classes
    runs_steps = config.cohort.mode is CohortMode.stacked
    if runs_steps or config.model.source is not ModelSource.torchvision:
        return factory.build(config.model, shape, classes, config.seed)
    try:
        with torch.device("meta"):
            return factory.build(config.model, shape, classes, config.seed)
    except NotImplementedError:  # RegNets compute their widths with tensors
        return factory.build(config.model, shape, classes, config.seed).to("meta")


def _check_parameters(config: Config, module: nn.Module) -> None:
    if any(is_lazy(value) for value in (*module.parameters(), *module.buffers())):
        remedy = "run one batch through it before it is returned"
        raise _network_error(config, "a network without lazy layers", remedy)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        remedy = "return one that has parameters"
        raise _network_error(config, "a network that can be trained", remedy)


def _check_not_scripted(config: Config, module: nn.Module) -> None:
    """Checks that no BN layer is hidden in TorchScript, where nothing can convert it."""
    for path, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            where = path or "the network"
            allowed = f"a network of which no part is TorchScript, and {where} is"
            remedy = "return it without torch.jit; BN layers in it cannot be converted"
            raise _network_error(config, allowed, f"{remedy} (compile=true compiles)")


def _check_batchnorm(config: Config, module: nn.Module) -> None:
    """Checks that the network has the BN layers that the algorithm or ``model.norm`` needs."""
    name, norm = config.algorithm.name, config.model.norm
    algorithm = ALGORITHMS[name]
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    if not layers and (_needs_batchnorm(algorithm) or algorithm.norm is not NormName.bn):
        allowed = "one that does without BN layers, because the network has none"
        raise ConfigError(format_option_error("algorithm.name", name, allowed, _FEDAVG))
    if not layers and norm in (NormName.gn, NormName.ln):
        allowed = "null, because the network has no BN layers to convert"
        remedy = "leave it out, or use a network with BN layers"
        raise ConfigError(format_option_error("model.norm", norm, allowed, remedy))
    keeps_bn = (norm or algorithm.norm) is NormName.bn
    if keeps_bn and any(layer.running_mean is None for layer in layers):
        allowed = "a network whose BN layers keep running statistics"
        remedy = "else its test accuracy depends on how the test set is split into batches"
        raise _network_error(config, allowed, remedy)


def _needs_batchnorm(algorithm: Algorithm) -> bool:
    """Whether the algorithm differs from FedAvg only in its treatment of BN layers."""
    in_layers = {ParameterGroup.affine, ParameterGroup.statistics, ParameterGroup.mixing}
    keeps_layers = bool(in_layers & algorithm.private)
    return (
        (algorithm.synchronised_steps != 0 and not algorithm.pooled_gradients)
        or (keeps_layers and ParameterGroup.weights not in algorithm.private)
        or algorithm.normaliser is not Normaliser.batch
        or algorithm.later_normaliser is not None
        or algorithm.mixes
    )


def _check_run(config: Config, module: nn.Module, example: Example) -> str:
    """Checks that the network returns scores that fit the task for two samples, in both modes.

    Returns which of its outputs are used in training; empty if it returns the scores alone.
    """
    for layer in module.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.register_forward_pre_hook(_check_group)
    single: list[str] = []
    for name, layer in batchnorm_layers(module).items():
        layer.register_forward_pre_hook(partial(_note_single_values, single, name))
    set_training_mode(module)
    output = _output(config, module, example)
    if single and config.batch_size == 1:
        _check_single_samples(config, single[0])
    objective = Objective.of(config)
    _check_scores(config, objective, output, example)
    _check_scores(config, objective, _output(config, module.eval(), example), example)
    if isinstance(output, Tensor) and config.model.output is not None:
        allowed = "null, because the network returns a tensor"
        message = format_option_error("model.output", config.model.output, allowed, "leave it out")
        raise ConfigError(message)
    return objective.describe(output)


def _note_single_values(
    names: list[str], name: str, layer: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    """Adds ``name`` to ``names`` if the layer gets one value per channel from each sample."""
    if layer.training and inputs[0].numel() == _SAMPLES * inputs[0].shape[1]:
        names.append(name)


def _check_single_samples(config: Config, layer: str) -> None:
    """Checks that ``layer`` never needs the variance of one value, that of one client's sample."""
    if not mixes_batches(config):
        remedy = "set batch_size=2, or use algorithm=centralised or fedavg_gn"
    elif (config.clients_per_round or config.clients) > 1 or ALGORITHMS[
        config.algorithm.name
    ].synchronised_steps == 0:
        return
    else:
        remedy = "set batch_size=2, or use more clients"
    allowed = f"2 or more, for BN layer {layer} would normalise a single value per channel"
    raise ConfigError(format_option_error("batch_size", 1, allowed, remedy))


def _output(config: Config, module: nn.Module, example: Example) -> Any:
    """Returns what the network returns for two samples."""
    device = next(module.parameters()).device
    samples = example.samples.to(device, torch.float32)
    try:
        return applied(module.to(device, torch.float32), samples.inputs)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        allowed = f"a network that takes samples of shape {example.shape}"
        is_large = config.model.source is ModelSource.torchvision and not config.model.small_input
        stem = "model.small_input=true, " if is_large else ""
        remedy = f"use {stem}other samples or another network: {one_line(error)}"
        raise _network_error(config, allowed, remedy) from error


def _check_scores(config: Config, objective: Objective, output: Any, example: Example) -> None:
    """Checks what the task gets of ``output``, and that it can compute loss and metrics of it."""
    option = config.model.output
    device = next((v.device for v in tree_leaves(output) if isinstance(v, Tensor)), None)
    targets = example.samples.to(device or torch.device("cpu"), torch.float32).labels
    expected = "a tensor"
    try:
        scores = objective.read(output)
        expected = objective.task.mistake(scores, targets, example.classes)
        found = str(tuple(scores.shape)) if expected else ""
    except (ValueError, AttributeError) as error:
        found = str(error)
    if found and option is not None and not isinstance(output, Tensor):
        allowed = f"the name or number of an output that is {expected} for {_SAMPLES} samples"
        raise ConfigError(format_option_error("model.output", option, allowed, f"this is {found}"))
    if found:
        allowed = f"a network whose scores for {_SAMPLES} samples are {expected}"
        raise _network_error(config, allowed, f"use another, because those of this one are {found}")
    if config.task.name is TaskName.import_:
        if targets.device.type == "meta":  # the output has no values
            output = tree_map_only(Tensor, partial(torch.zeros_like, device="cpu"), output)
            targets = example.samples.labels
        _check_own_task(config, objective, output, targets)


def _check_own_task(config: Config, objective: Objective, output: Any, targets: Tensor) -> None:
    """Checks that the user's task computes losses and metrics of two samples."""
    if wrong := objective.wrong_sizes(output, targets):
        n = _SAMPLES
        allowed = f"a task with losses ({n},) and sums ({n}, S) for {n} samples"
        raise ConfigError(format_option_error("task.target", config.task.target, allowed, wrong))


def _check_class_weights(config: Config, example: Example) -> None:
    weights = config.task.class_weights
    if weights is not None and len(weights) != example.classes:
        allowed, remedy = f"one number for each of the {example.classes} classes", "give so many"
        raise ConfigError(format_option_error("task.class_weights", weights, allowed, remedy))


def _check_stack(config: Config, module: nn.Module, example: Example) -> None:
    """Checks that clients of the network can be stacked, if ``cohort.mode`` says so."""
    stacked = config.cohort.mode is CohortMode.stacked
    if not stacked or config.model.source is ModelSource.builtin:
        return
    sample = example.samples.to(torch.device("cpu"), torch.float32)[:1]
    if error := vmap_error(module, sample, config, Loss.of(config)):
        allowed = "auto or sequential, because clients of the network cannot be stacked"
        remedy = f"leave it out: {one_line(error)}"
        raise ConfigError(format_option_error("cohort.mode", "stacked", allowed, remedy))


def _check_copies(config: Config, module: nn.Module, ranks: int) -> None:
    """Checks that the network can be copied, if ranks will have several models."""
    if needs_copies(config, ranks // config.ranks_per_client) and (error := copy_error(module)):
        allowed = "a network that can be copied, for a rank has several clients or their models"
        raise _network_error(config, allowed, f"copy.deepcopy refuses {error}")


def _check_group(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Checks that a group has two values; a single value always normalises to 0."""
    assert isinstance(layer, nn.GroupNorm)
    groups = layer.num_groups
    if inputs[0][0].numel() // groups < 2:
        allowed = f"fewer groups, because one of {layer.num_channels} channels would have one value"
        remedy = f"try algorithm.groups={max(1, groups // 2)}"
        raise ConfigError(format_option_error("algorithm.groups", groups, allowed, remedy))


def _network_error(config: Config, allowed: str, remedy: str) -> ConfigError:
    model = config.model
    is_target = model.source is ModelSource.import_
    option, value = ("model.target", model.target) if is_target else ("model.name", model.name)
    return ConfigError(format_option_error(option, value, allowed, remedy))
