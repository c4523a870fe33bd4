"""The groups of a model's tensors that algorithms treat differently.

Used by ``training`` to average, keep or step tensors of some groups.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batchnorm.layer import FedTANBatchNorm
from ..config.algorithms import ParameterGroup
from ..distributed.model_average import named_tensors


class TensorFilter:
    """Selects the tensors of some ``groups`` from ``module`` and from copies of it.

    Parameters that are not trained and the statistics of frozen BN layers are left out: they stay
    equal on all ranks.
    """

    def __init__(self, module: nn.Module, groups: Collection[ParameterGroup]) -> None:
        fixed = {id(value) for value in module.parameters() if not value.requires_grad}
        for layer in module.modules():
            if isinstance(layer, FedTANBatchNorm) and layer.is_frozen:
                fixed |= {id(buffer) for buffer in layer.buffers()}
        tensors = named_tensors(module)
        self.names = [
            name
            for name, group in groups_of(module).items()
            if group in groups and id(tensors[name]) not in fixed
        ]

    def __call__(self, module: nn.Module) -> dict[str, Tensor]:
        """Returns the selected tensors of ``module`` by name, in the module's order."""
        tensors = named_tensors(module)
        return {name: tensors[name] for name in self.names}


def groups_of(module: nn.Module) -> dict[str, ParameterGroup]:
    """Returns the group of every tensor of ``module`` by name; a shared tensor has one name."""
    names = {id(tensor): name for name, tensor in named_tensors(module).items()}
    groups = dict.fromkeys(names.values(), ParameterGroup.weights)
    groups |= dict.fromkeys((names[id(each)] for each in module.buffers()), ParameterGroup.buffers)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            for name, value in layer.named_parameters(recurse=False):
                is_mix = name == "mix"
                group = ParameterGroup.mixing if is_mix else ParameterGroup.affine
                groups[names[id(value)]] = group
            for buffer in layer.buffers(recurse=False):
                groups[names[id(buffer)]] = ParameterGroup.statistics
    return groups


def pack(tensors: Collection[Tensor]) -> Tensor:
    """Returns all values as one vector, in the widest floating-point type of ``tensors``."""
    if not tensors:
        return torch.empty(0)
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            dtype = torch.promote_types(dtype, tensor.dtype.to_real())
    return torch.cat([_real(tensor).reshape(-1).to(dtype) for tensor in tensors])


@torch.no_grad()
def unpack(vector: Tensor, tensors: Collection[Tensor]) -> None:
    """Copies the values of a ``vector`` from ``pack`` into ``tensors`` of the same shapes."""
    reals = [_real(tensor) for tensor in tensors]
    for real, values in zip(reals, vector.split([real.numel() for real in reals]), strict=True):
        real.copy_(values.view(real.shape))


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
