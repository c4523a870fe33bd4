"""The identity on which all else rests: sum_k p_k g_k is the gradient of the pooled problem."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

import fedtan_hpc
from tests.helpers import networks, pooled
from tests.helpers.ranks import on_ranks


def client_gradients(case: str, federated: bool) -> dict[str, Tensor]:
    """sum_k p_k g_k on this rank, which is client k; plain BN if not ``federated``."""
    rank, clients = dist.get_rank(), dist.get_world_size()
    p = networks.weights(clients)[rank]
    x, y = networks.batches(case, clients)[rank]
    module = networks.network(case)
    if federated:
        module = fedtan_hpc.convert_batchnorm(module)
        with fedtan_hpc.federated_statistics(module, weight=p):
            cross_entropy(module(x), y).backward()
    else:
        cross_entropy(module(x), y).backward()
    return pooled.summed_over_ranks(module, p)


def pooled_gradient(case: str, clients: int) -> dict[str, Tensor]:
    batches, p = networks.batches(case, clients), networks.weights(clients)
    return pooled.pooled_gradient(networks.network(case), batches, p)


@pytest.mark.parametrize("clients", [2, 3, 4])
@pytest.mark.parametrize("case", networks.CASES)
def test_mean_of_client_gradients_is_the_pooled_gradient(case: str, clients: int) -> None:
    expected = pooled_gradient(case, clients)
    for measured in on_ranks(clients, client_gradients, case, True):
        assert pooled.worst_relative_error(measured, expected) < 1e-10


@pytest.mark.parametrize("case", networks.CASES)
def test_plain_batchnorm_fails_the_identity(case: str) -> None:
    measured = on_ranks(3, client_gradients, case, False)[0]
    assert pooled.worst_relative_error(measured, pooled_gradient(case, 3)) > 1e-3
