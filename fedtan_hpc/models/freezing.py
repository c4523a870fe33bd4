"""Parts of a network that do not train: ``model.freeze``.

A BN layer whose parameters are all frozen, or whose name matches, also keeps its running statistics
and normalises by them in training (``training.local_step.set_training_mode``).  Used by ``job``.
"""

from collections.abc import Sequence
from difflib import get_close_matches

from torch import nn

from ..batchnorm.layer import FedTANBatchNorm
from ..config.errors import ConfigError, format_option_error
from ..distributed.model_average import matches


def freeze(module: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """Freezes what matches one of ``patterns``; returns ``module``, whose BN layers are converted.

    A pattern is the name of a parameter or a layer, in which ``*`` stands for any letters; a layer
    stands for all that is in it.

    Raises ``ConfigError`` for a pattern that matches nothing, and if no parameter would train.
    """
    layers = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    names = dict(module.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(_matches(name, [pattern]) for name in (*names, *layers)):
            near = get_close_matches(pattern, [*layers, *names], n=3) or layers[:3]
            allowed = "names of layers or parameters of the network, with * for any letters"
            remedy = f"it matches none; near are {', '.join(near)}"
            raise ConfigError(format_option_error("model.freeze", pattern, allowed, remedy))
    for name, parameter in names.items():
        if _matches(name, patterns):
            parameter.requires_grad_(False)
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, FedTANBatchNorm) and _is_frozen(name, layer, patterns):
            layer.is_frozen = True
            layer.requires_grad_(False)
    if patterns and not any(value.requires_grad for value in module.parameters()):
        text = f"[{','.join(patterns)}]"
        remedy = "leave out a pattern, for example that of the last layer"
        allowed = "patterns that leave a parameter to train"
        raise ConfigError(format_option_error("model.freeze", text, allowed, remedy))
    return module


def _is_frozen(name: str, layer: FedTANBatchNorm, patterns: Sequence[str]) -> bool:
    prefix = f"{name}." if name else ""
    own = [f"{prefix}{each}" for each in ("weight", "bias") if getattr(layer, each) is not None]
    return _matches(name, patterns) or bool(own and all(_matches(each, patterns) for each in own))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(matches(name, pattern) for pattern in patterns)
