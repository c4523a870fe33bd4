"""What a rank keeps from round to round: the global model and all that belongs to it.

The round loop (``job.trainer``) calls ``begin_round``, runs the clients with ``runner``, and calls
``end_round``; ``job.checkpoint_writer`` and ``job.resume`` save and load the state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config.algorithms import ALGORITHMS
from ..distributed import structure
from ..distributed.model_average import ModelSum, named_tensors
from ..models.parameter_groups import TensorFilter, groups_of
from .client_runners import ClientModels, ClientRunners
from .local_step import RoundContext
from .optimizers import STATE_NAMES, STEP, State, trained_parameters
from .server_optimizer import ServerOptimizer


class Cohort:
    """The global model, private client states, optimizer states, and the frame of a round."""

    def __init__(
        self, models: ClientModels, server: ServerOptimizer, runner: ClientRunners
    ) -> None:
        self.model = models.model
        """The global model between rounds; in a round also the first client's replica.

        Between rounds its private tensors have the values of a client that was never drawn.
        """
        self.loss, self.states, self.runner = models.loss, models.states, runner
        self.ranks = models.ranks
        self._pooled, self._server = models.pooled, server
        self._pools = ALGORITHMS[models.config.algorithm.name].pooled_gradients
        self._groups = groups_of(self.model)
        self._unchanged: list[tuple[Tensor, Tensor]] = []
        """Buffers that the client in ``model`` may change but the round must not, and copies."""

    def begin_round(self, context: RoundContext) -> ModelSum:
        """Prepares a round; returns the empty sum that takes the clients' models."""
        averaged = TensorFilter(self.model, context.plan.averaged)
        buffers = {id(buffer) for buffer in self.model.buffers()}
        self._unchanged = [
            (buffer, buffer.clone())
            for name, buffer in named_tensors(self.model).items()
            if id(buffer) in buffers
            and self._groups[name] not in self.states.parts
            and not (name in averaged.names and buffer.is_floating_point())
        ]
        self._server.begin_round(self.model)
        return ModelSum(self.model, counters=True, select=averaged)

    def end_round(self, model_sum: ModelSum) -> None:
        """Makes ``model`` the new global model, equal on all ranks, and takes the server's step."""
        model_sum.all_reduce()
        self.states.end_round()
        self.states.reset(self.model)
        for buffer, value in self._unchanged:
            buffer.copy_(value)
        model_sum.copy_to(self.model)
        self._server.step(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Returns CPU copies of all that outlives a round, except the private client states."""
        return {
            "model": {name: _copy(value) for name, value in named_tensors(self.model).items()},
            "server": [_copy(value) for value in self._server.state_dict()],
            "optimizer": _each(_copy, self._pooled.state_dict()),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what ``state_dict`` returned in a run whose model has the same tensors.

        Clients that were never drawn begin with the private values of that model.
        """
        device = next(self.model.parameters()).device
        for name, value in named_tensors(self.model).items():
            value.copy_(state["model"][name])
        self.states.begin_with(self.model)
        self._server.load_state_dict([value.to(device) for value in state["server"]])
        pooled = (
            state["optimizer"] if "optimizer" in state else self._of_momentum(state["momentum"])
        )
        if self._pools:  # else the state would grow old
            self._pooled.load_state_dict(_each(lambda value: value.to(device), pooled))

    def state_misfit(self, state: dict[str, Any]) -> str:
        """Returns the first part by which ``state`` does not fit; empty if it may be loaded.

        ``state`` has the keys and kinds of a state of ``state_dict``.
        """
        own = named_tensors(self.model)
        if why := structure.difference(state["model"], own):
            return why
        if why := self._server.misfit(state["server"], self.model):
            return why
        return _optimizer_misfit(state.get("optimizer", {}), trained_parameters(self.model))

    def _of_momentum(self, buffers: list[Tensor]) -> State:
        """Returns the state in a checkpoint of an earlier version: the momentum of SGD."""
        names = trained_parameters(self.model)
        return {n: {"momentum_buffer": each} for n, each in zip(names, buffers, strict=False)}


def _each(function: Callable[[Tensor], Tensor], state: State) -> State:
    return {
        name: {key: function(each) for key, each in tensors.items()}
        for name, tensors in state.items()
    }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _optimizer_misfit(state: State, parameters: dict[str, Tensor]) -> str:
    kinds = set[frozenset[str]]()
    for name, tensors in state.items():
        like = parameters.get(name)
        for key, tensor in tensors.items():
            if like is None or tensor.shape != (() if key == STEP else like.shape):
                return f"the optimizer's state has {key!r:.80} of {name!r:.80}, which does not fit"
        kinds |= {frozenset(tensors)} if tensors else set()
    if len(kinds) > 1 or not kinds <= STATE_NAMES:
        return "the optimizer's state is neither of SGD nor of Adam"
    return ""
