"""The server's step on the averaged model (FedOpt, Reddi et al. 2021; Hsu et al. 2019).

With x the global trainable values and Delta = average - x the clients' mean change in a round:

    momentum   m = beta m + Delta                            x += lr m
    adam       m = beta m + (1 - beta) Delta
               v = beta2 v + (1 - beta2) Delta^2             x += lr m / (sqrt(v) + tau)
    yogi       v = v - (1 - beta2) Delta^2 sign(v - Delta^2), the rest as adam

Running statistics are not in x: a step beyond an average of variances could end below zero.  All
ranks take the same step on the same values.  Used by ``cohort``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config.enums import ServerOptimizerName
from ..config.schema import ServerConfig
from ..models.parameter_groups import TensorFilter, pack, unpack

_LEARNING_RATES = {ServerOptimizerName.adam: 0.01, ServerOptimizerName.yogi: 0.01}
"""Default learning rates; 1 for the others."""


class ServerOptimizer:
    """Steps the tensors of ``trained``, which are averaged and trainable."""

    def __init__(self, config: ServerConfig, trained: TensorFilter) -> None:
        self._kind = config.optimizer
        self._rate = _either(config.lr, _LEARNING_RATES.get(config.optimizer, 1.0))
        self._beta = _either(config.momentum, 0.9)
        self._beta2 = _either(config.beta2, 0.99)
        self._tau = _either(config.tau, 1e-3)
        self._trained = trained
        self._before = self._mean = self._squared = torch.empty(0)

    def begin_round(self, model: nn.Module) -> None:
        """Remembers the global values before the round."""
        if self._kind is not ServerOptimizerName.none:
            self._before = pack(self._trained(model).values())

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Replaces the averaged values in ``model`` by those of the server's step."""
        if self._before.numel() == 0:  # no server optimizer, or nothing to train
            return
        tensors = list(self._trained(model).values())
        direction = self._direction(pack(tensors) - self._before)
        unpack(self._before.add(direction, alpha=self._rate), tensors)

    def state_dict(self) -> list[Tensor]:
        """Returns the mean change and the mean squared change."""
        return [self._mean, self._squared]

    def load_state_dict(self, state: list[Tensor]) -> None:
        """Loads what ``state_dict`` returned in an optimizer of the same kind; none keeps none."""
        if self._kind is not ServerOptimizerName.none:
            self._mean, self._squared = state

    def misfit(self, state: Sequence[Tensor], model: nn.Module) -> str:
        """Returns why ``state`` is not that of a server that steps ``model``; empty if it is."""
        like = pack(self._trained(model).values())
        for value in state if self._kind is not ServerOptimizerName.none else ():
            if value.numel() and (value.shape, value.dtype) != (like.shape, like.dtype):
                found = f"{tuple(value.shape)} {value.dtype}"
                return f"the server steps {like.numel()} values, and its state has {found}"
        return ""

    def _direction(self, delta: Tensor) -> Tensor:
        beta = self._beta
        if self._mean.numel() == 0:
            self._mean = torch.zeros_like(delta)
            self._squared = torch.full_like(delta, self._tau**2)
        if self._kind is ServerOptimizerName.momentum:
            self._mean.mul_(beta).add_(delta)
            return self._mean
        self._mean.lerp_(delta, 1 - beta)
        square, share = delta.square(), 1 - self._beta2
        if self._kind is ServerOptimizerName.adam:
            self._squared.lerp_(square, share)
        else:
            self._squared.addcmul_(square, torch.sign(self._squared - square), value=-share)
        return self._mean / (self._squared.sqrt() + self._tau)


def _either(given: float | None, default: float) -> float:
    return default if given is None else given
