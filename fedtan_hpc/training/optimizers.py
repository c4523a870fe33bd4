"""The clients' optimizers: torch's, with parameter groups, clipping, and state by name.

One ``ClientOptimizer`` steps one client, or a stack of clients at once.  Used by ``local_step``,
``stacked`` and ``pooled_gradients``.

Shapes: K stacked clients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..config.enums import OptimizerName
from ..config.schema import OptimizerConfig
from ..distributed.model_average import named_tensors

State = dict[str, dict[str, Tensor]]
"""State by name of a parameter, then by torch's name of the state, such as exp_avg."""

STEP = "step"
"""torch's name of the number of steps, the only state without the shape of its parameter."""
STATE_NAMES = {frozenset({"momentum_buffer"}), frozenset({STEP, "exp_avg", "exp_avg_sq"})}
"""torch's names of a parameter's state: of SGD with momentum, and of Adam and AdamW."""
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def trained_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Returns the trainable parameters by name, each once, in the order of their names."""
    return {name: value for name, value in named_tensors(module).items() if value.requires_grad}


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings that the optimizers of all clients of a round share."""

    options: OptimizerConfig
    learning_rate: float
    undecayed: frozenset[str] = frozenset()
    """Names of the parameters that have no weight decay."""

    @classmethod
    def of(
        cls, options: OptimizerConfig, learning_rate: float, model: nn.Module
    ) -> "OptimizerSettings":
        """Returns the settings of a round for copies of ``model``."""
        undecayed = frozenset() if options.decay_norm else undecayed_names(model)
        return cls(options, learning_rate, undecayed)


def undecayed_names(module: nn.Module) -> frozenset[str]:
    """Returns the parameters of normalization layers, biases and other vectors, by name."""
    in_norms = {
        id(value)
        for layer in module.modules()
        if isinstance(layer, _NORMS)
        for value in layer.parameters(recurse=False)
    }
    return frozenset(
        name
        for name, value in trained_parameters(module).items()
        if id(value) in in_norms or value.ndim <= 1 or name.endswith("bias")
    )


class ClientOptimizer:
    """Steps the parameters ``values``, (...) each by name; ``stacked`` ones are (K, ...)."""

    def __init__(
        self, values: Mapping[str, Tensor], settings: OptimizerSettings, stacked: bool = False
    ) -> None:
        self.settings, self._values, self._is_stacked = settings, values, stacked
        undecayed = [value for name, value in values.items() if name in settings.undecayed]
        decayed = [value for name, value in values.items() if name not in settings.undecayed]
        groups: list[dict[str, Any]]
        groups = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
        self._optimizer = _of_torch([group for group in groups if group["params"]], settings)

    def zero_grad(self) -> None:
        """Clears the gradients."""
        self._optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Takes a step; clips the gradient of each client, that of all its parameters together.

        The fused kernels (torch 2.13, CPU) read memory linearly: if a gradient lies channels first
        and its parameter channels last, they silently mix up the values.  So gradients and state
        are brought into the memory order of their parameters.
        """
        values = list(self._values.values())
        for value in values:
            if value.grad is None:
                continue
            value.grad = _in_memory_order(value.grad, value)
            state = self._optimizer.state[value]
            for key, tensor in state.items():
                if key != STEP and tensor is not None:
                    state[key] = _in_memory_order(tensor, value)
        if self.settings.options.clip_norm is not None:
            clip(values, self.settings.options.clip_norm, self._is_stacked)
        self._optimizer.step()

    def state(self) -> State:
        """Returns the state of all parameters that have some; the tensors are not copies."""
        return {
            name: {key: each for key, each in state.items() if each is not None}
            for name, value in self._values.items()
            if (state := self._optimizer.state.get(value))
        }

    def load(self, state: State) -> None:
        """Loads copies of ``state``; a stack gives them to each of its clients."""
        for name, tensors in state.items():
            value = self._values[name]
            self._optimizer.state[value] = {
                key: (each if key == STEP else each.expand_as(value)).clone()
                for key, each in tensors.items()
            }

    def state_of(self, client_index: int) -> State:
        """Returns the state of one client of the stack."""
        return {
            name: {k: each if k == STEP else each[client_index] for k, each in tensors.items()}
            for name, tensors in self.state().items()
        }

    def free(self) -> None:
        """Forgets the state."""
        self._optimizer.state.clear()


def state_tensors(options: OptimizerConfig) -> int:
    """Returns how many tensors of state a parameter has."""
    if options.name is OptimizerName.sgd:
        return 1 if options.momentum else 0
    return 2


@torch.no_grad()
def clip(values: Sequence[Tensor], largest: float, stacked: bool) -> None:
    """Scales the gradients of ``values`` so that their common L2 norm is at most ``largest``.

    Of ``stacked`` values each client has a norm of its own.
    """
    gradients = [value.grad for value in values if value.grad is not None]
    if not gradients:
        return
    clients = len(gradients[0]) if stacked else 1
    norms = [torch.linalg.vector_norm(each.reshape(clients, -1), dim=1) for each in gradients]
    norm_K = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    scale_K = largest / norm_K.clamp_min(largest)
    for each in gradients:
        if stacked:
            each.mul_(scale_K.view(-1, *[1] * (each.ndim - 1)))
        else:
            each.mul_(scale_K[0])


def _of_torch(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    options, lr = settings.options, settings.learning_rate
    decay = options.weight_decay
    fused = all(_suits_fused(value) for group in groups for value in group["params"])
    if options.name is OptimizerName.sgd:
        return torch.optim.SGD(
            groups,
            lr=lr,
            momentum=options.momentum,
            weight_decay=decay,
            nesterov=options.nesterov,
            fused=fused,
        )
    kind = torch.optim.Adam if options.name is OptimizerName.adam else torch.optim.AdamW
    beta1, beta2 = options.betas or (0.9, 0.999)
    eps = 1e-8 if options.eps is None else options.eps
    return kind(groups, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, fused=fused)


def _suits_fused(value: Tensor) -> bool:
    """Whether torch's fused kernels take ``value``: real, and without gaps in its memory.

    They read memory linearly, and would take the gaps for values: those of a slice, for example.
    """
    has_no_gaps = _strides(torch.empty_like(value, device="meta")) == _strides(value)
    return value.is_floating_point() and has_no_gaps


def _in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    if _strides(tensor) == _strides(like):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def _strides(tensor: Tensor) -> list[int]:
    """Strides of dimensions larger than 1; the other strides have no meaning."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
