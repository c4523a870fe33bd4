"""The server's step on the averaged model (FedOpt, Reddi et al. 2021; Hsu et al. 2019).

With x the global trainable values and Delta = average - x the clients' mean change of a round:

    momentum   m = beta m + Delta                            x += lr m
    adam       m = beta m + (1 - beta) Delta
               v = beta2 v + (1 - beta2) Delta^2             x += lr m / (sqrt(v) + tau)
    yogi       v = v - (1 - beta2) Delta^2 sign(v - Delta^2), the rest as adam

Running statistics are never among x: they are averages, and a step beyond an average of variances
could end below zero.  All ranks take the same step on the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config.enums import ServerOptimizerName
from ..config.schema import ServerConfig
from ..distributed.model_average import Select
from ..models.parameter_groups import pack, unpack

_LEARNING_RATES = {
    ServerOptimizerName.momentum: 1.0,
    ServerOptimizerName.adam: 0.01,
    ServerOptimizerName.yogi: 0.01,
}


class Server:
    """Holds the mean change and the mean squared change from round to round."""

    def __init__(self, config: ServerConfig, select: Select) -> None:
        self._kind = config.optimizer
        self._rate = _either(config.lr, _LEARNING_RATES.get(config.optimizer, 1.0))
        self._beta = _either(config.momentum, 0.9)
        self._beta2 = _either(config.beta2, 0.99)
        self._tau = _either(config.tau, 1e-3)
        self._select = select
        """The tensors that take part: averaged and trainable."""
        self._before = self._mean = self._squared = torch.empty(0)

    @property
    def _is_idle(self) -> bool:
        return self._kind is ServerOptimizerName.none

    def begin(self, model: nn.Module) -> None:
        """Take note of the global model before a round."""
        if not self._is_idle:
            self._before = pack(self._select(model).values())

    def memory(self) -> list[Tensor]:
        """What a later round needs to know of those before."""
        return [self._mean, self._squared]

    def recall(self, memory: list[Tensor]) -> None:
        """Go on from the ``memory`` of another server of the same kind."""
        self._mean, self._squared = memory

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Go from the values before the round on, as the average in ``model`` suggests."""
        if self._is_idle or self._before.numel() == 0:
            return
        tensors = list(self._select(model).values())
        change = self._direction(pack(tensors) - self._before)
        unpack(self._before.add(change, alpha=self._rate), tensors)

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


def _either(given: float | None, otherwise: float) -> float:
    return otherwise if given is None else given
