"""torch's wrappers around a converted model: DistributedDataParallel and FSDP2."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fedtan_hpc import average_model, convert_batchnorm, federated_statistics
from tests.batchnorm.layers import randn
from tests.helpers.ranks import on_ranks

SIZES = (3, 1, 4)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2), nn.BatchNorm1d(2)
    return nn.Sequential(*layers).double()


def batch(rank: int) -> Tensor:
    return randn(SIZES[rank], 4, seed=rank) * (1 + rank) + rank


def weighted_sum(
    weight: float,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Returns sum_k p_k g_k, in place of DistributedDataParallel's mean."""
    work = dist.all_reduce(bucket.buffer().mul_(weight), async_op=True)
    sums: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return sums


def gradients_of_ddp() -> list[Tensor]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    weight = SIZES[rank] / sum(SIZES[:ranks])
    model = DistributedDataParallel(convert_batchnorm(network()), broadcast_buffers=False)
    model.register_comm_hook(weight, weighted_sum)
    with federated_statistics(model, weight):
        model(batch(rank)).square().sum(1).mean().backward()
    return [value.grad for value in model.parameters() if value.grad is not None]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ddp_with_unequal_batches_gives_the_pooled_gradient(ranks: int) -> None:
    pooled = network()
    x = torch.cat([batch(rank) for rank in range(ranks)])
    pooled(x).square().sum(1).mean().backward()
    expected = [value.grad for value in pooled.parameters()]
    for found in on_ranks(ranks, gradients_of_ddp):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def error_of(function: Callable[[], None]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "no error"


def average_of_one_sharded_client() -> str:
    model = convert_batchnorm(network())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with federated_statistics(model, 0.5):
        model(batch(dist.get_rank())).sum().backward()
    return error_of(lambda: average_model(model, 0.5))


def test_the_shards_of_one_client_are_not_averaged() -> None:
    for message in on_ranks(2, average_of_one_sharded_client):
        assert "0.bias is sharded over ranks [0, 1], which belong to one client" in message


def average_of_sharded_clients() -> list[Tensor]:
    """Ranks 0 and 1 hold client 0, ranks 2 and 3 client 1, whose values are 1 more."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("client", "shard"))
    client = dist.get_rank() // 2
    model = convert_batchnorm(network())
    with torch.no_grad():
        for value in model.parameters():
            value.add_(client)
    fully_shard(model, mesh=mesh["shard"])
    average_model(model, (0.25, 0.75)[client], mesh.get_group("client"))
    return [value.full_tensor() for value in model.parameters()]  # type: ignore[attr-defined]


def test_sharded_clients_are_averaged_shard_by_shard() -> None:
    expected = [value + 0.75 for value in network().parameters()]
    for found in on_ranks(4, average_of_sharded_clients):
        torch.testing.assert_close(found, expected)
