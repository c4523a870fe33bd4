"""The conversion of a network's BN layers to FedTAN's, and back.

A user's training loop and ``models`` convert; ``context`` and ``training`` ask for the layers.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layer import FedTANBatchNorm

Layer = TypeVar("Layer", bound=FedTANBatchNorm)
Kinds: TypeAlias = Mapping[type[_BatchNorm], Callable[[Any, Tensor], Tensor] | None]
"""Classes of BN layers; ``function(layer, y)`` is what such a layer does to normalised values y, or
None for nothing."""

CONVERTIBLE: Kinds = dict.fromkeys(
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
)
"""BN layers that can be converted without losing any of their behaviour."""
_number_of_conversions = [0]
"""Models that this process has converted."""


def convert_batchnorm(module: nn.Module, kinds: Kinds | None = None) -> nn.Module:
    """Turns every BN layer in ``module`` into a ``FedTANBatchNorm``; returns ``module``.

    Converts BatchNorm1d/2d/3d, SyncBatchNorm, and timm's BatchNormAct2d and SyncBatchNormAct.  Its
    layers stay the same objects, with their parameters, buffers, hooks and settings, so that
    state_dict keys, optimizers and every reference to a layer stay valid; they also stay instances
    of their classes.  ``revert_batchnorm`` undoes it.

    Args:
        module: the network.
        kinds: other subclasses of torch's BN layers, whose ``forward`` normalises as torch does and
            then applies a function; maps each class to ``function(layer, y)``, or to None.

    Raises ``ValueError``, and changes nothing, if ``module`` has another kind of BN layer (lazy,
    quantised, a user's subclass, TorchScript), whose behaviour the conversion would lose.
    """
    layers = {}
    for name, layer in module.named_modules():
        _refuse_torchscript(name, layer)
        if isinstance(layer, _BatchNorm) and not isinstance(layer, FedTANBatchNorm):
            known = known_kinds(type(layer), kinds)
            if type(layer) not in known:
                raise ValueError(_unknown_kind(name, layer))
            layers[name] = layer, known[type(layer)]
    if layers:
        _number_of_conversions[0] += 1
    for name, (layer, then) in layers.items():
        if getattr(layer, "process_group", None) is not None:
            warnings.warn(
                f"layer {name or '(root)'}: the process_group of SyncBatchNorm has no effect after "
                "conversion; give its group to federated_statistics",
                stacklevel=2,
            )
        converted: Any = layer
        converted._has_context, converted._model_number = False, _number_of_conversions[0]
        converted.__class__ = fedtan_class(FedTANBatchNorm, type(layer), then)
    return module


def revert_batchnorm(module: nn.Module) -> nn.Module:
    """Gives every converted layer in ``module`` its former class back; returns ``module``.

    Parameters and buffers stay.  For tools that know torch's layers by their exact class or source
    text: ``torch.jit.script``, ``torch.ao.quantization.fuse_modules``.  A layer of HBN loses its
    ``mix``.  To train on, revert a ``copy.deepcopy``.
    """
    for layer in module.modules():
        if isinstance(layer, FedTANBatchNorm) and layer.former_class is not None:
            layer._parameters.pop("mix", None)
            reverted: Any = layer
            reverted.__class__ = layer.former_class
    return module


def number_of_conversions() -> int:
    """Returns how many models this process has converted."""
    return _number_of_conversions[0]


def known_kinds(kind: type[_BatchNorm], others: Kinds | None = None) -> Kinds:
    """Returns the classes that can be converted; timm's are known by their names."""
    if kind.__module__.startswith("timm.") and kind.__name__ in _TIMM:
        return {**CONVERTIBLE, kind: _drop_and_activate, **(others or {})}
    return {**CONVERTIBLE, **(others or {})}


_TIMM = ("BatchNormAct2d", "SyncBatchNormAct")


def _drop_and_activate(layer: Any, y: Tensor) -> Tensor:
    value: Tensor = layer.act(layer.drop(y))
    return value


def fedtan_class(
    base: type[Layer], former: type[_BatchNorm], then: Callable[[Any, Tensor], Tensor] | None
) -> type[Layer]:
    """Returns the subclass of ``base`` and ``former`` for layers that were a ``former``.

    torch.fx, and all that builds on it, treats modules of torch.nn as units and traces through all
    others; BN's checks of shapes cannot be traced.  So the class says that it is of torch.nn.
    """
    if (base, former, then) in _classes:
        known: type[Layer] = _classes[base, former, then]
        return known
    prefix = base.__name__.removesuffix("BatchNorm")
    members = {
        "former_class": former,
        "_then": then,
        "__doc__": base.__doc__,
        "__module__": former.__module__ if former in CONVERTIBLE else base.__module__,
        "__reduce_ex__": _reduce,
        "__prepare_scriptable__": _refuse_scripting,
    }
    made: type[Layer] = type(f"{prefix}{former.__name__}", (base, former), members)
    _classes[base, former, then] = made
    return made


_classes: dict[tuple[Any, ...], Any] = {}


def _reduce(layer: FedTANBatchNorm, protocol: int) -> tuple[Any, ...]:
    """Returns how to copy or pickle a converted layer: its class has no importable name."""
    cls = type(layer)
    base = next(kind for kind in cls.__mro__[1:] if issubclass(kind, FedTANBatchNorm))
    return _new, (base, layer.former_class, vars(cls)["_then"]), layer.__getstate__()


def _new(base: type[Layer], former: type[_BatchNorm], then: Any) -> Layer:
    cls = fedtan_class(base, former, then)
    return cls.__new__(cls)


def _refuse_scripting(layer: FedTANBatchNorm) -> None:
    raise RuntimeError(
        "TorchScript cannot compile FedTAN's BN layers: script "
        "fedtan_hpc.revert_batchnorm(copy.deepcopy(model))"
    )


def _refuse_torchscript(name: str, layer: nn.Module) -> None:
    if isinstance(layer, torch.jit.ScriptModule):
        raise ValueError(f"{name or 'the module'} is TorchScript: convert it before scripting")


def _unknown_kind(name: str, layer: _BatchNorm) -> str:
    kind = type(layer).__name__
    message = f"layer {name or '(root)'} is a {kind}, which convert_batchnorm does not know"
    if "Lazy" in kind:
        return f"{message}; run one batch through lazy layers first"
    return (
        f"{message}; if it normalises as torch's BN and then at most changes the result y, pass "
        f"kinds={{{kind}: function of (layer, y), or None}}"
    )


def batchnorm_layers(module: nn.Module) -> dict[str, FedTANBatchNorm]:
    """Returns the FedTAN layers by name, in the order of their names, each once.

    The order is the same on ranks that have built the model in another order.  Raises
    ``ValueError`` for an unconverted BN layer, and for TorchScript, whose layers are out of reach.
    """
    layers: dict[str, FedTANBatchNorm] = {}
    seen = set()
    for name, layer in sorted(module.named_modules(remove_duplicate=False), key=lambda x: x[0]):
        _refuse_torchscript(name, layer)
        if isinstance(layer, FedTANBatchNorm):
            if layer not in seen:
                layers[name or "(root)"] = layer
            seen.add(layer)
        elif isinstance(layer, _BatchNorm):
            raise ValueError(f"layer {name or '(root)'} is local BN: call convert_batchnorm first")
    return layers
