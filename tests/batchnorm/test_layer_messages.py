"""What the exchanges of a layer send, and how ranks at different layers end."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedtan_hpc import convert_batchnorm, federated_statistics
from fedtan_hpc.distributed.counters import training_traffic
from tests.batchnorm.layers import randn
from tests.helpers import networks
from tests.helpers.ranks import RankFailed, on_ranks

WIDTHS = {
    "1d": [5, 4],
    "shared": [5, 5],
    "branches": [4, 4],
    "3d": [4, 5],
    "not affine": [5, 4],
    "no running statistics": [5, 4],
}


def traffic_of_one_step(case: str, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Messages and bytes of the forward and of the backward pass."""
    rank, clients = dist.get_rank(), dist.get_world_size()
    x, y = networks.batches(case, clients)[rank]
    x, module = x.to(dtype), convert_batchnorm(networks.network(case)).to(dtype)
    found = []
    with federated_statistics(module, networks.weights(clients)[rank]):
        before = training_traffic.copy()
        loss = cross_entropy(module(x), y)
        found.append(training_traffic.since(before))
        before = training_traffic.copy()
        loss.backward()
        found.append(training_traffic.since(before))
    cross_entropy(module(x), y).backward()
    assert training_traffic.since(before) == found[1]
    return [(traffic.messages, traffic.bytes) for traffic in found]


def traffic_on_this_rank(dtype: torch.dtype) -> dict[str, list[tuple[int, int]]]:
    return {case: traffic_of_one_step(case, dtype) for case in WIDTHS}


@cache
def traffic_by_rank(clients: int, dtype: torch.dtype) -> list[dict[str, list[tuple[int, int]]]]:
    return on_ranks(clients, traffic_on_this_rank, dtype)


@pytest.mark.parametrize("case", WIDTHS)
@pytest.mark.parametrize("clients", [2, 3])
def test_each_use_of_a_layer_costs_one_message_forward_and_one_backward(
    case: str, clients: int
) -> None:
    both_ways = len(WIDTHS[case]), sum(8 * (4 + 2 * width) for width in WIDTHS[case])
    for measured in traffic_by_rank(clients, torch.float32):
        assert measured[case] == [both_ways, both_ways]


@pytest.mark.parametrize("case", WIDTHS)
@pytest.mark.parametrize("clients", [2, 3])
def test_mean_and_variance_of_float64_values_are_a_message_each(case: str, clients: int) -> None:
    forward = 2 * len(WIDTHS[case]), sum(2 * 8 * (4 + width) for width in WIDTHS[case])
    backward = len(WIDTHS[case]), sum(8 * (4 + 2 * width) for width in WIDTHS[case])
    for measured in traffic_by_rank(clients, torch.float64):
        assert measured[case] == [forward, backward]


class TwoBranches(nn.Module):
    """Branches of given widths, run in a given order."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right = nn.BatchNorm1d(left), nn.BatchNorm1d(right)

    def forward(self, x: Tensor, order: list[str]) -> dict[str, Tensor]:
        layers = {"left": self.left, "right": self.right}
        return {name: layers[name](x[:, : layers[name].num_features]) for name in order}


def order_of(rank: int) -> list[str]:
    return ["left", "right"] if rank == 0 else ["right", "left"]


def error_of(mix_up: Callable[[nn.Module, Tensor], object]) -> str:
    """What ``mix_up`` of two branches raises on this rank."""
    module = convert_batchnorm(TwoBranches(4, 4).double())
    with federated_statistics(module, 1 / dist.get_world_size()):
        try:
            mix_up(module, randn(5, 4).requires_grad_())
        except RuntimeError as error:
            return str(error)
    return "no error"


def mix_up_forward(module: nn.Module, x: Tensor) -> None:
    module(x, order_of(dist.get_rank()))


def mix_up_backward(module: nn.Module, x: Tensor) -> None:
    y = module(x, ["left", "right"])
    for name in order_of(dist.get_rank()):
        torch.autograd.grad(y[name].square().sum(), x)


MIX_UPS = {"forward": mix_up_forward, "backward": mix_up_backward}


def errors_of_mix_ups() -> dict[str, str]:
    return {name: error_of(mix_up) for name, mix_up in MIX_UPS.items()}


@cache
def errors_of_mix_ups_by_rank(clients: int) -> list[dict[str, str]]:
    return on_ranks(clients, errors_of_mix_ups)


@pytest.mark.parametrize("clients", [2, 3])
@pytest.mark.parametrize("mix_up", MIX_UPS)
def test_branches_of_one_width_in_different_orders_raise_on_every_rank(
    mix_up: str, clients: int
) -> None:
    for messages in errors_of_mix_ups_by_rank(clients):
        places = [f"rank {k} at BN layer {order_of(k)[0]} ({mix_up})" for k in range(clients)]
        assert messages[mix_up].startswith("the ranks are at different calls: ")
        assert sorted(messages[mix_up].split(": ")[1].split(", ")) == places


def forward_mix_up_of_widths(left: int, right: int, folder: Path) -> None:
    """Leaves a file if the forward pass comes to an end."""
    module = convert_batchnorm(TwoBranches(left, right).double())
    with federated_statistics(module, 1 / dist.get_world_size()):
        module(randn(5, max(left, right)), order_of(dist.get_rank()))
    (folder / str(dist.get_rank())).touch()


@pytest.mark.parametrize(("left", "right", "clients"), [(3, 9, 2), (9, 3, 3)])
def test_branches_of_other_widths_in_different_orders_end_the_job_without_a_result(
    left: int, right: int, clients: int, tmp_path: Path
) -> None:
    with pytest.raises(RankFailed) as failure:
        on_ranks(clients, forward_mix_up_of_widths, left, right, tmp_path, seconds=20)
    assert "no answer within" not in str(failure.value)
    assert list(tmp_path.iterdir()) == []
