"""A client's gradients are the same, summed during the backward pass or after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedtan_hpc.distributed.counters import training_traffic
from fedtan_hpc.training import client_gradients
from fedtan_hpc.training.client_ranks import ClientRanks
from fedtan_hpc.training.optimizers import trained_parameters
from tests.helpers.ranks import on_ranks

SHARES = (0.75, 0.25)


class Network(nn.Module):
    """Four layers; one is frozen and one may be left out or used twice, in parts computed anew."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(4))
        self.layers[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a loss."""
        twice = self.layers[3]
        if self.way == "computed anew":  # each of the two passes adds to the same gradients
            x = checkpoint(twice, x, use_reentrant=True)
        for layer in self.layers[: 3 if self.way == "left out" else 4]:
            x = (
                checkpoint(layer, x, use_reentrant=True)
                if self.way == "computed anew"
                else layer(x)
            )
            x = torch.tanh(x)
        return x.square().mean()


def gradients(way: str, overlaps: bool, limit: int) -> tuple[list[list[Tensor]], int]:
    """The gradients of two steps on this rank, and the messages within the client."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_gradients, "_BUCKET_BYTES", limit)
        ranks = ClientRanks.of(2, overlaps)
        torch.manual_seed(0)
        module, share = Network(way), SHARES[ranks.part.member]
        averaged = ranks.gradients(module, share)
        torch.manual_seed(1 + ranks.part.member)
        before, found = training_traffic.copy(), []
        with averaged.overlapped():
            for _ in range(2):
                module.zero_grad()
                module(torch.randn(5, 6, dtype=torch.float64, requires_grad=True)).backward()
                values = trained_parameters(module).values()
                for value in values:
                    value.grad = torch.zeros_like(value) if value.grad is None else value.grad
                averaged.average()
                found.append([value.grad.clone() for value in values if value.grad is not None])
        return found, training_traffic.since(before).client_messages


@pytest.mark.parametrize(
    ("way", "limit", "messages"),
    [
        ("plain", 10**9, 1),
        ("plain", 1, 6),
        ("plain", 400, 2),
        ("left out", 1, 1),  # the first bucket never becomes ready, and the others wait for it
        ("computed anew", 1, 7),
    ],
)
def test_sums_during_the_backward_pass_are_those_after_it(
    way: str, limit: int, messages: int
) -> None:
    after = on_ranks(2, gradients, way, False, limit)
    during = on_ranks(2, gradients, way, True, limit)
    for (expected, plain), (found, overlapped) in zip(after, during, strict=True):
        assert (plain, overlapped) == (2, 2 * messages)
        for step, wanted in zip(found, expected, strict=True):
            assert len(step) == 6
            for ours, theirs in zip(step, wanted, strict=True):
                assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)
    assert all(torch.equal(*pair) for pair in zip(during[0][0][1], during[1][0][1], strict=True))
