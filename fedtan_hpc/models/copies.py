"""Deep copies of networks, of such too that keep results of their last forward pass.

Used by ``training`` for replicas, by ``evaluation`` for clients' models, and by ``job.dry_run``.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..config.errors import one_line


def copied(module: nn.Module) -> nn.Module:
    """Returns a deep copy of ``module``; tensors that it has computed are constants in it.

    ``copy.deepcopy`` by itself refuses such tensors, which torch's older ``weight_norm`` and
    ``spectral_norm`` keep in their layers and compute anew in each forward pass.
    """
    computed = {id(value): value.detach().clone() for value in _computed(module)}
    return copy.deepcopy(module, computed)


def copy_error(module: nn.Module) -> str:
    """Returns which layer cannot be copied and why; empty if the whole module can."""
    try:
        copied(module)
    except Exception as error:  # an object in a user's network may raise anything
        reason = one_line(error)
    else:
        return ""
    for path, layer in reversed(list(module.named_modules())):
        try:
            copied(layer)
        except Exception:
            return f"{path or 'the network'}, a {type(layer).__name__}: {reason}"
    return reason


def _computed(module: nn.Module) -> Iterator[Tensor]:
    for layer in module.modules():
        yield from _in(list(layer.__dict__.values()))


def _in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors with a gradient function in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, Mapping):
        yield from _in(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _in(each)
