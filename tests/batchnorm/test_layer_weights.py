"""Weights and batches that are not valid, and ranks without weight."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fedtan_hpc import convert_batchnorm, federated_statistics
from tests.batchnorm.layers import Values, assert_close, gradients, randn
from tests.helpers import networks, ranks

BAD: dict[str, tuple[list[float], list[int], str]] = {
    "negative": ([-0.5, 1.5], [5, 8], "a weight on 2 ranks is negative or not finite"),
    "NaN": ([float("nan"), 1.0], [5, 8], "a weight on 2 ranks is negative or not finite"),
    "infinite": ([1.0, float("inf")], [5, 8], "a weight on 2 ranks is negative or not finite"),
    "more than 1": ([0.5, 0.6], [5, 8], "the weights sum to 1.1 "),
    "all zero": ([0.0, 0.0], [5, 8], "the weights sum to 0 "),
    "beyond float32": ([1e300, 0.5], [5, 8], "the weights sum to "),
    "one value": ([1.0, 0.0], [1, 6], "one value per channel on all ranks together"),
    "negative of three": ([0.4, -0.2, 0.8], [5, 8, 3], "a weight on 3 ranks is negative or not"),
    "two of three": ([0.3, -1.0, float("nan")], [5, 8, 3], "a weight on 3 ranks is negative"),
    "less than 1": ([0.3, 0.3, 0.3], [5, 8, 3], "the weights sum to 0.9 "),
    "empty": ([0.3, 0.3, 0.4], [5, 0, 4], "a batch is empty, with a weight above 0"),
}


def messages_of_errors() -> dict[str, str | None]:
    """What the ValueError of each bad case for so many ranks says on this one; None without."""
    rank, found = dist.get_rank(), {}
    for name, (p, sizes, _) in BAD.items():
        if len(p) == dist.get_world_size():
            found[name] = message_of_error(p[rank], sizes[rank])
    return found


def message_of_error(weight: float, size: int) -> str | None:
    module = convert_batchnorm(networks.network("shared"))
    with federated_statistics(module, weight):
        try:
            module(randn(size, 6))
        except ValueError as error:
            return str(error)
    return None


@cache
def messages_by_rank(clients: int) -> list[dict[str, str | None]]:
    return ranks.on_ranks(clients, messages_of_errors)


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_and_batches_raise_on_every_rank_and_name_the_layer(name: str) -> None:
    p, _, reason = BAD[name]
    for messages in messages_by_rank(len(p)):
        assert (messages[name] or "no error").startswith(f"layer bn: {reason}")


WEIGHTLESS = {
    "NaN": torch.full((4, 6), torch.nan, dtype=torch.float64),
    "infinite": torch.full((4, 6), torch.inf, dtype=torch.float64),
    "empty": torch.zeros(0, 6, dtype=torch.float64),
    "one sample": randn(1, 6, seed=3),
}
COUNTING = [randn(5, 6, seed=1), randn(7, 6, seed=2) + 1]


def two_steps(weight: float, x: Tensor) -> Values:
    """Output, gradients and buffers on this rank after two forward and one backward pass."""
    module = convert_batchnorm(networks.network("1d"))
    with federated_statistics(module, weight):
        module(x)
        y = module(x)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), **gradients(module), **dict(module.named_buffers())}


def steps_of_counting_ranks() -> Values:
    rank = dist.get_rank()
    return two_steps((0.4, 0.6)[rank], COUNTING[rank])


def steps_beside_a_weightless_rank() -> dict[str, Values]:
    """The same with rank 1 put between the two, for each batch that it may hold."""
    rank = dist.get_rank()
    return {
        name: two_steps((0.4, 0.0, 0.6)[rank], (COUNTING[0], batch, COUNTING[1])[rank])
        for name, batch in WEIGHTLESS.items()
    }


@cache
def steps_by_rank() -> tuple[list[Values], list[dict[str, Values]]]:
    return ranks.on_ranks(2, steps_of_counting_ranks), ranks.on_ranks(
        3, steps_beside_a_weightless_rank
    )


@pytest.mark.parametrize("batch", WEIGHTLESS)
def test_a_rank_without_weight_changes_nothing_for_the_others(batch: str) -> None:
    expected, by_rank = steps_by_rank()
    first, weightless, second = (found[batch] for found in by_rank)
    assert_close(first, expected[0], 1e-12)
    assert_close(second, expected[1], 1e-12)
    for name in first:
        if "running" in name:
            assert torch.equal(weightless[name], first[name])
