"""A layer with the statistics of all ranks against the pooled problem in one process."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedtan_hpc import convert_batchnorm, federated_statistics
from tests.batchnorm.layers import (
    GLOBAL_SHAPES,
    Values,
    assert_close,
    assert_same_bits,
    client_data,
    fill,
    global_moments,
    layer_of_all_clients,
    randn,
    run_layer,
)
from tests.helpers import networks, ranks


def uses_on_this_rank(p: list[float]) -> dict[str, Values]:
    """One global use of a layer on this rank's data, for every shape."""
    rank = dist.get_rank()
    found = {}
    for name, shape in GLOBAL_SHAPES.items():
        layer = convert_batchnorm(fill(nn.SyncBatchNorm(shape[0])).double())
        with federated_statistics(layer, p[rank]):
            found[name] = run_layer(layer, *client_data(shape, len(p))[rank])
    return found


@cache
def uses_by_rank(clients: int) -> list[dict[str, Values]]:
    return ranks.on_ranks(clients, uses_on_this_rank, networks.weights(clients))


@pytest.mark.parametrize("shape", GLOBAL_SHAPES)
@pytest.mark.parametrize("clients", [2, 3])
def test_output_and_all_derivatives_are_those_of_the_pooled_problem(
    shape: str, clients: int
) -> None:
    data = client_data(GLOBAL_SHAPES[shape], clients)
    expected = layer_of_all_clients(data, networks.weights(clients))
    for found, truth in zip(uses_by_rank(clients), expected, strict=True):
        assert_close({name: found[shape][name] for name in truth}, truth, 1e-10)


OLD = {"running_mean": randn(3, seed=31), "running_var": randn(3, seed=32).abs() + 1}
RUNNING_WEIGHTS = [[0.5, 0.5, 0.0], [0.2, 0.5, 0.3]]
THREE_CALLS = [[randn(n, 3, seed=40 + s + n) + s for n in (4, 6, 3)] for s in range(3)]


def buffers_after(momentum: float | None, weight: float, xs: list[Tensor]) -> Values:
    """This rank's buffers after one global use for each of ``xs``."""
    layer = convert_batchnorm(nn.SyncBatchNorm(3, momentum=momentum).double())
    layer.load_state_dict(OLD, strict=False)
    with federated_statistics(layer, weight):
        for x in xs:
            layer(x)
    return {name: value.clone() for name, value in layer.named_buffers()}


def buffers_on_this_rank() -> dict[str, Values]:
    """Buffers after one call by case, and after three calls without momentum."""
    rank = dist.get_rank()
    found = {
        f"{shape} {p}": buffers_after(0.1, p[rank], [client_data(GLOBAL_SHAPES[shape], 3)[rank][0]])
        for shape in GLOBAL_SHAPES
        for p in RUNNING_WEIGHTS
    }
    calls = [xs[rank] for xs in THREE_CALLS]
    return found | {"three calls": buffers_after(None, RUNNING_WEIGHTS[0][rank], calls)}


@cache
def buffers_by_rank() -> list[dict[str, Values]]:
    return ranks.on_ranks(3, buffers_on_this_rank)


def the_same_bits_everywhere(case: str) -> Values:
    """The case's buffers, which all ranks have alike."""
    measured = [found[case] for found in buffers_by_rank()]
    for other in measured[1:]:
        assert_same_bits(other, measured[0])
    return measured[0]


@pytest.mark.parametrize("p", RUNNING_WEIGHTS, ids=str)
@pytest.mark.parametrize("shape", GLOBAL_SHAPES)
def test_running_statistics_move_towards_the_global_ones(shape: str, p: list[float]) -> None:
    mean, variance = global_moments(p, [x for x, _ in client_data(GLOBAL_SHAPES[shape], 3)])
    expected = {
        "running_mean": 0.9 * OLD["running_mean"] + 0.1 * mean,
        "running_var": 0.9 * OLD["running_var"] + 0.1 * variance,
        "num_batches_tracked": torch.tensor(1),
    }
    assert_close(the_same_bits_everywhere(f"{shape} {p}"), expected, 1e-14)


def test_without_momentum_running_statistics_are_means_over_the_calls() -> None:
    moments = [global_moments(RUNNING_WEIGHTS[0], xs) for xs in THREE_CALLS]
    means, variances = zip(*moments, strict=True)
    expected = {
        "running_mean": torch.stack(means).mean(0),
        "running_var": torch.stack(variances).mean(0),
        "num_batches_tracked": torch.tensor(3),
    }
    assert_close(the_same_bits_everywhere("three calls"), expected, 1e-14)


def step_in_a_group_of_two(data: list[tuple[Tensor, Tensor]]) -> Values:
    """Ranks 0 and 2 normalise together, ranks 1 and 3 too; ranks take ``data`` in rank order."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    layer = convert_batchnorm(fill(nn.BatchNorm1d(3)).double())
    with federated_statistics(layer, (0.25, 0.75)[rank // 2], group=groups[rank % 2]):
        return run_layer(layer, *data[rank])


def test_groups_of_ranks_are_independent() -> None:
    data = client_data((3,), 4)
    measured = ranks.on_ranks(4, step_in_a_group_of_two, data)
    for first in (0, 1):
        pair = [first, first + 2]
        expected = layer_of_all_clients([data[k] for k in pair], [0.25, 0.75])
        for k, truth in zip(pair, expected, strict=True):
            assert_close({name: measured[k][name] for name in truth}, truth, 1e-12)
