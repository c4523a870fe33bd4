"""Which tensors of a model belong to which part, for algorithms that treat parts differently."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config.algorithms import ParameterGroup
from ..distributed.model_average import named_tensors


class TensorFilter:
    """The tensors of some parts of a module; called with the module or a copy of it.

    Returns them by name, in the module's order.  Parameters that are not trained are never among
    them: they stay as they are on all ranks.
    """

    def __init__(self, module: nn.Module, parts: Collection[ParameterGroup]) -> None:
        frozen = {name for name, value in module.named_parameters() if not value.requires_grad}
        named = groups_of(module).items()
        self.names = [name for name, part in named if part in parts and name not in frozen]

    def __call__(self, module: nn.Module) -> dict[str, Tensor]:
        """The same tensors of ``module``."""
        tensors = named_tensors(module)
        return {name: tensors[name] for name in self.names}


def groups_of(module: nn.Module) -> dict[str, ParameterGroup]:
    """The part of every tensor of ``module`` by name."""
    parts = dict.fromkeys(named_tensors(module), ParameterGroup.weights)
    parts |= dict.fromkeys((name for name, _ in module.named_buffers()), ParameterGroup.buffers)
    for prefix, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            for name, _ in layer.named_parameters(prefix=prefix, recurse=False):
                parts[name] = (
                    ParameterGroup.mixing if name.endswith("mix") else ParameterGroup.affine
                )
            for name, _ in layer.named_buffers(prefix=prefix, recurse=False):
                parts[name] = ParameterGroup.statistics
    return parts


def pack(tensors: Collection[Tensor]) -> Tensor:
    """All values as one vector, in the widest floating-point type among them."""
    if not tensors:
        return torch.empty(0)
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            dtype = torch.promote_types(dtype, tensor.dtype.to_real())
    return torch.cat([_real(tensor).reshape(-1).to(dtype) for tensor in tensors])


@torch.no_grad()
def unpack(vector: Tensor, tensors: Collection[Tensor]) -> None:
    """Give ``tensors`` the values that ``pack`` took from others of the same shapes."""
    reals = [_real(tensor) for tensor in tensors]
    for real, values in zip(reals, vector.split([real.numel() for real in reals]), strict=True):
        real.copy_(values.view(real.shape))


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
