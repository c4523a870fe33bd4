"""A client's gradients are the same, summed during the backward pass or after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedtan_hpc.distributed import process_group
from fedtan_hpc.distributed.counters import training_traffic
from fedtan_hpc.training import client_gradients
from fedtan_hpc.training.client_ranks import ClientRanks
from tests.helpers.ranks import RankFailed, on_ranks

SHARES = (0.75, 0.25)


class Network(nn.Module):
    """Four layers; one is frozen.

    "left out": the last one is not used, "on one": not on the second rank.  "again": it is used
    twice, in two parts that are computed anew, each of which adds to the same gradients.
    """

    def __init__(self, way: str, member: int) -> None:
        super().__init__()
        self.is_again = way == "again"
        self.used = 3 if way == "left out" or (way == "on one" and member == 1) else 4
        self.layers = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(4))
        self.layers[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a loss."""
        layers = list(self.layers)[: self.used]
        for layer in [*layers, *layers[3:]] if self.is_again else layers:
            y = checkpoint(layer, x, use_reentrant=True) if self.is_again else layer(x)
            x = torch.tanh(y)
        return x.square().mean()


class Result(NamedTuple):
    steps: list[list[Tensor]]
    """Gradients of this rank after each step."""
    messages: int
    """Messages within the client."""
    early: int
    """Of them those that began before the last gradient was there."""


def gradients(way: str, overlaps: bool, limit: int, kind: str = "cpu") -> Result:
    """What two steps of a client on two ranks leave on this one."""
    ranks = ClientRanks.of(2, overlaps)
    device = torch.device(kind)
    if kind == "cuda":  # the ranks share a GPU if there is but one
        device = torch.device(kind, process_group.rank() % torch.cuda.device_count())
    torch.manual_seed(0)
    member = ranks.part.member
    module = Network(way, member).to(device)
    values = list(module.parameters())
    trained = [value for value in values if value.requires_grad]
    sent: list[int] = []
    values[0].register_hook(lambda _: sent.append(training_traffic.client_messages))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_gradients, "_BUCKET_BYTES", limit)
        averaged = ranks.gradients(module, SHARES[member])
    torch.manual_seed(1 + member)
    before, steps = training_traffic.client_messages, []
    with averaged.overlapped():
        for _ in range(2):
            start = training_traffic.client_messages
            module.zero_grad()
            x = torch.randn(5, 6, dtype=torch.float64).to(device).requires_grad_()
            module(x).backward()
            sent[-1] -= start
            for value in trained:
                value.grad = torch.zeros_like(value) if value.grad is None else value.grad
            averaged.average()
            steps.append([value.grad.cpu() for value in trained if value.grad is not None])
    return Result(steps, training_traffic.client_messages - before, sum(sent))


Way: TypeAlias = tuple[str, int, int, bool]
"""A way of the network, bytes of a bucket, messages of a step, and whether some begin early."""
WAYS: list[Way] = [
    ("plain", 10**9, 1, False),
    ("plain", 1, 6, True),
    ("plain", 400, 2, True),
    ("left out", 1, 6, False),  # the others wait for the first bucket, which is never ready
    ("on one", 1, 6, True),
    ("on one", 400, 2, True),
]


def check(launch: Callable[..., list[Result]], kind: str, way: Way) -> None:
    """Compares sums during the pass with those after it, on two ranks that ``launch`` starts."""
    name, limit, messages, early = way
    wanted, found = (launch(2, gradients, name, each, limit, kind) for each in (False, True))
    for after, during in zip(wanted, found, strict=True):
        assert (after.messages, during.messages) == (2, 2 * messages)
        for expected, step in zip(after.steps, during.steps, strict=True):
            assert len(step) == 6
            for theirs, ours in zip(expected, step, strict=True):
                assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)
    assert (found[0].early > 0) == early
    for pair in zip(found[0].steps[1], found[1].steps[1], strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_sums_during_the_backward_pass_are_those_after_it(way: Way) -> None:
    check(on_ranks, "cpu", way)


def test_a_gradient_that_grows_after_it_was_sent_is_an_error() -> None:
    [one, other] = on_ranks(2, gradients, "again", True, 10**9)  # one bucket: sent after the pass
    assert one.messages == other.messages == 2
    with pytest.raises(RankFailed, match=r"use checkpoint\(use_reentrant=False\)"):
        on_ranks(2, gradients, "again", True, 1)
