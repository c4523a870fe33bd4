"""Finds out whether clients of a network can be stacked, by taking the steps that a job takes.

Networks fail if they change their own buffers, branch on values, or use what torch.func cannot do.
Used by ``client_runners`` on a GPU and by ``job.dry_run``.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...batchnorm.layer import FedTANBatchNorm
from ...batchnorm.statistics_call import GlobalStatistics, Verify
from ...config.algorithms import RoundPlan, plan
from ...config.schema import Config
from ...data.batching import Samples
from ...data.client_store import Client
from ...distributed.model_average import model_tensors
from ...models.copies import copied
from ...runtime import global_random
from ...runtime.transfer import copy_all
from ..local_step import LocalRun, Loss, RoundContext, set_training_mode
from .vmap_clients import Stack

_SIZES = ((2, 2), (2, 3))
"""Samples of the clients of each trial: whole batches, and batches that are padded."""


def vmap_error(model: nn.Module, sample: Samples, config: Config, loss: Loss) -> Exception | None:
    """Returns the error of stacking two clients of ``model`` with samples like the one given.

    Takes synchronised and local steps, as far as the job of ``config`` has such, with random
    samples of its shape.  Sends nothing to other ranks, and leaves the model
    and the random state as they are.
    """
    plans = dict.fromkeys(plan(config, number) for number in (1, config.rounds))
    gpus = [sample.device] if sample.device.type == "cuda" else []
    with global_random.preserved(gpus), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vmap, about its own speed
        global_random.seed(0, sample.device)
        try:
            for each in plans:
                for sizes in _SIZES:
                    clients = [_client(number, sample, size) for number, size in enumerate(sizes)]
                    _train(copied(model), clients, RoundContext(1, 0.1, each), config, loss)
        except Exception as error:  # a user's network may raise anything
            return error
    return None


class _UnsentStatistics(GlobalStatistics):
    """Global statistics over the clients of this rank alone."""

    def sum(self, message: Tensor, place: str) -> Tensor:
        """Returns the message of this rank."""
        return message

    def read_header(self, header: Tensor, verify: Verify) -> Sequence[Any]:
        """Returns n and P, unchecked: the header is not that of all ranks."""
        return header[2:].unbind()


class _TrialStack(Stack):
    _statistics_class = _UnsentStatistics

    def _tag_of(self, layers: Mapping[str, FedTANBatchNorm]) -> int:
        """Returns a tag that no other rank has to know."""
        return 0


def _client(number: int, sample: Samples, size: int) -> Client:
    labels = sample.labels[:1].expand(size, *sample.labels.shape[1:]).clone()

    def drawn(values: Tensor) -> Tensor:
        shaped = values[:1].expand(size, *values.shape[1:])
        return torch.randn_like(shaped) if values.is_floating_point() else shaped.clone()

    return Client(number, 0.5, sample.map_inputs(drawn, labels))


def _train(
    model: nn.Module, clients: list[Client], context: RoundContext, config: Config, loss: Loss
) -> None:
    """Does what ``StackedRunner`` does in a round, with a step of each kind."""
    plan = context.plan
    replica, steps = copied(model), _steps(plan, config)
    options = replace(config, local_steps=sum(steps), local_epochs=None)
    options.batch_size = max(2, config.batch_size)
    set_training_mode(model, plan)
    runs = [LocalRun(replica, client, context, options, loss) for client in clients]
    stack = _TrialStack(model, runs)
    buffers = dict(model.named_buffers())
    synchronised, local = steps
    if synchronised:
        stack.synchronised_step()
    if local:
        stack.local_step(max_stacked=len(clients))
    for name, value in model.named_buffers():
        if value is not buffers[name]:
            raise ValueError(f"the forward pass replaces the buffer {name}")
    copy_all(model_tensors(replica), model_tensors(model))
    for client_index in range(len(clients)):
        stack.extract_client(client_index)


def _steps(plan: RoundPlan, config: Config) -> tuple[bool, bool]:
    """Returns whether rounds of ``plan`` have synchronised and local steps."""
    return plan.synchronised_steps > 0, plan.synchronised_steps < config.local_steps
