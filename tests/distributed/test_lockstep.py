"""Several clients on a rank: the identity again, however the clients are spread over the ranks."""

from __future__ import annotations

import copy
import os
import threading
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedtan_hpc
from fedtan_hpc.distributed import collectives, counters, process_group
from fedtan_hpc.distributed.lockstep import Lockstep
from tests.helpers import networks, pooled
from tests.helpers.ranks import on_ranks

CLIENTS = 4
SPREADS = {
    "all on one": [[0, 1, 2, 3]],
    "two and two": [[2, 0], [1, 3]],
    "one and three": [[3], [0, 1, 2]],
    "one each": [[0], [1], [2], [3]],
    "a rank without": [[0, 1], [2, 3], []],
}


def loss_of(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(module(x), y)


def gradients(case: str, spread: list[list[int]]) -> tuple[dict[str, Tensor], int]:
    """sum_k p_k g_k over all clients of all ranks, and the messages that it took."""
    mine = spread[process_group.rank()]
    p, batches = networks.weights(CLIENTS), networks.batches(case, CLIENTS)
    chosen = [(p[k], *batches[k]) for k in mine] or [(0.0, batches[0][0][:1], batches[0][1][:1])]
    module = fedtan_hpc.convert_batchnorm(networks.network(case))
    replicas = [copy.deepcopy(module) for _ in chosen]
    losses = [partial(loss_of, r, x, y) for r, (_, x, y) in zip(replicas, chosen, strict=True)]
    before = counters.training_traffic.copy()
    fedtan_hpc.federated_backward(replicas, losses, [weight for weight, _, _ in chosen])
    messages = counters.training_traffic.since(before).messages
    sums = {}
    for name, parameter in module.named_parameters():
        total = torch.zeros_like(parameter)
        for replica, (weight, _, _) in zip(replicas, chosen, strict=True):
            gradient = replica.get_parameter(name).grad
            assert gradient is not None
            total += weight * gradient
        sums[name] = collectives.sum_over_ranks(total.detach())
    return sums, messages


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("case", networks.CASES)
def test_mean_of_client_gradients_is_the_pooled_gradient(case: str, spread: str) -> None:
    p, batches = networks.weights(CLIENTS), networks.batches(case, CLIENTS)
    expected = pooled.pooled_gradient(networks.network(case), batches, p)
    results = on_ranks(len(SPREADS[spread]), gradients, case, SPREADS[spread])
    for measured, messages in results:
        assert pooled.worst_relative_error(measured, expected) < 1e-10
        assert messages == 6  # two BN layers (or two uses of one), in float64 two forward, one back


def buffers(spread: list[list[int]]) -> list[dict[str, Tensor]]:
    mine = spread[dist.get_rank()]
    p, batches = networks.weights(CLIENTS), networks.batches("2d", CLIENTS)
    module = fedtan_hpc.convert_batchnorm(networks.network("2d"))
    replicas = [copy.deepcopy(module) for _ in mine]
    losses = [partial(loss_of, r, *batches[k]) for r, k in zip(replicas, mine, strict=True)]
    fedtan_hpc.federated_backward(replicas, losses, [p[k] for k in mine])
    return [dict(replica.named_buffers()) for replica in replicas]


def test_running_statistics_are_equal_on_all_clients_to_the_bit() -> None:
    found = [state for rank in on_ranks(2, buffers, [[2, 0], [1, 3]]) for state in rank]
    assert len(found) == 4
    for state in found[1:]:
        assert all(torch.equal(state[name], value) for name, value in found[0].items())
    alone = on_ranks(4, buffers, [[0], [1], [2], [3]])[0][0]
    for name, value in alone.items():
        assert torch.allclose(found[0][name], value, rtol=1e-12, atol=1e-14)


def pair() -> list[nn.Module]:
    module = fedtan_hpc.convert_batchnorm(networks.network("branches"))
    return [module, copy.deepcopy(module)]


def test_an_error_of_one_client_ends_all() -> None:
    x, y = networks.batches("branches", 1)[0]
    good, bad = pair()

    def whole() -> Tensor:
        return loss_of(good, x, y)

    def fails() -> Tensor:
        bad.left(x)  # type: ignore[operator]
        raise OSError("client 1's own")

    with pytest.raises(OSError, match="client 1's own"):
        fedtan_hpc.federated_backward([good, bad], [whole, fails], [0.5, 0.5])
    with pytest.raises(OSError, match="client 1's own"):
        fedtan_hpc.federated_backward([bad, good], [fails, whole], [0.5, 0.5])


def test_clients_that_run_different_layers_are_an_error() -> None:
    x, y = networks.batches("branches", 1)[0]
    one, other = pair()

    def whole() -> Tensor:
        return loss_of(one, x, y)

    def half() -> Tensor:
        return other.left(x).sum()  # type: ignore[operator, no-any-return]

    with pytest.raises(RuntimeError, match=r"same layers|another layer"):
        fedtan_hpc.federated_backward([one, other], [whole, half], [0.5, 0.5])
    with pytest.raises(RuntimeError, match=r"same layers|another layer"):
        fedtan_hpc.federated_backward([other, one], [half, whole], [0.5, 0.5])


def test_arguments_must_belong_together() -> None:
    module = pair()[0]
    loss = partial(torch.zeros, ())
    with pytest.raises(ValueError, match="equally many"):
        fedtan_hpc.federated_backward([module], [], [1.0])
    with pytest.raises(ValueError, match="of its own"):
        fedtan_hpc.federated_backward([module, module], [loss, loss], [0.5, 0.5])


def test_weights_are_checked_over_all_clients() -> None:
    x, y = networks.batches("branches", 1)[0]
    modules = pair()
    losses = [partial(loss_of, module, x, y) for module in modules]
    with pytest.raises(ValueError, match=r"sum to 0\.9"):
        fedtan_hpc.federated_backward(modules, losses, [0.5, 0.4])


def test_lanes_take_turns_and_keep_the_callers_grad_mode() -> None:
    order: list[int] = []

    def client_index(number: int) -> bool:
        for _ in range(2):
            order.append(number)
            assert int(steps.exchange(torch.tensor(number + 1))) == 6
        return torch.is_grad_enabled()

    steps = Lockstep(
        [partial(client_index, k) for k in range(3)], lambda parts: torch.stack(parts).sum()
    )
    with torch.no_grad():
        assert steps.run() == [False] * 3
    assert order == [0, 1, 2, 0, 1, 2]


def test_clients_in_lockstep_keep_the_callers_autocast() -> None:
    x, y = networks.batches("branches", 1)[0]
    modules = [module.float() for module in pair()]
    seen = []

    def loss(module: nn.Module) -> Tensor:
        scores = module(x.float())
        seen.append(scores.dtype)
        return cross_entropy(scores, y)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [partial(loss, module) for module in modules]
        fedtan_hpc.federated_backward(modules, losses, [0.5, 0.5])
    assert seen == [torch.bfloat16] * 2


def test_clients_in_lockstep_keep_the_callers_number_of_threads() -> None:
    """Also in threads that an earlier step, with another number, has left."""
    steps = partial(Lockstep, [torch.get_num_threads] * 2, lambda _: torch.zeros(0))
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            assert steps().run() == [number] * 2
    finally:
        torch.set_num_threads(before)


def test_threads_are_kept_for_later_steps() -> None:
    """Also after a failure; a process that is forked has none and makes its own."""

    def idents(number: int) -> set[int]:
        return set(Lockstep([threading.get_native_id] * number, lambda _: torch.zeros(0)).run())

    def fail() -> int:
        raise ValueError("not today")

    first = idents(3)
    assert len(first) == 3
    assert idents(2) < first
    with pytest.raises(ValueError, match="not today"):
        Lockstep([threading.get_native_id, fail], lambda _: torch.zeros(0)).run()
    assert idents(3) == first
    child = os.fork()
    if child == 0:
        os._exit(0 if len(idents(3)) == 3 else 1)
    deadline = time.monotonic() + 30
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(found[1]) == 0


def test_models_of_one_rank_may_be_converted_one_by_one() -> None:
    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()

    x = torch.randn(6, 4, dtype=torch.float64)
    models = [fedtan_hpc.convert_batchnorm(plain()) for _ in range(2)]
    halves = [lambda m=m, x=x: m(x).square().sum() for m, x in zip(models, x.chunk(2), strict=True)]
    fedtan_hpc.federated_backward(models, halves, [0.5, 0.5])
    pooled = plain()
    pooled(x).square().sum().backward()
    for right, *found in zip(*(m.parameters() for m in (pooled, *models)), strict=True):
        total = sum(value.grad for value in found if value.grad is not None)
        torch.testing.assert_close(total, right.grad, rtol=1e-9, atol=1e-9)


def one_by_one(picks: list[list[list[int]]]) -> None:
    """Each rank converts three models one by one, and trains clients on some in each round."""
    models = [fedtan_hpc.convert_batchnorm(networks.network("branches")) for _ in range(3)]
    batches = networks.batches("branches", 3)
    for chosen in picks:
        mine = chosen[dist.get_rank()]
        losses = [partial(loss_of, models[k], *batches[k]) for k in mine]
        weight = 1 / sum(map(len, chosen))
        fedtan_hpc.federated_backward([models[k] for k in mine], losses, [weight] * len(mine))


def test_ranks_may_take_other_copies_in_each_round() -> None:
    on_ranks(2, one_by_one, [[[0, 2], [1]], [[1], [0, 2]], [[2], [0]]])
