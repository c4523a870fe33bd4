"""Ranks whose models, layers or calls differ: pairs by name, and errors that say what differs."""

import copy
import re
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fedtan_hpc import (
    average_model,
    average_models,
    convert_batchnorm,
    federated_backward,
    federated_statistics,
)
from fedtan_hpc.batchnorm import conversion
from fedtan_hpc.distributed import collectives
from fedtan_hpc.distributed.counters import progress
from tests.batchnorm.layers import randn
from tests.helpers.ranks import on_ranks


def network(width: int = 3, classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, classes)
    return convert_batchnorm(nn.Sequential(*layers))


def step(module: nn.Module, weight: float = 0.5) -> None:
    with federated_statistics(module, weight):
        module(randn(5, 4).to(next(module.parameters()).dtype)).square().sum().backward()


def in_any_order() -> dict[str, list[float]]:
    """A model whose parts each rank has added in another order; rank r's values are r more."""
    rank = dist.get_rank()
    names = ["a", "b", "c"] if rank == 0 else ["c", "b", "a"]
    module = nn.ModuleDict({name: nn.BatchNorm1d(1) for name in names})
    for name in names:
        nn.init.constant_(module[name].weight, ord(name) + rank)  # type: ignore[arg-type]
    convert_batchnorm(module)
    with federated_statistics(module, 0.5):
        for name in "abc":
            x = (torch.arange(4.0) + ord(name)).unsqueeze(1).requires_grad_()
            module[name](x).square().sum().backward()
    average_model(module, 0.5)
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value.reshape(-1).tolist() for name, value in values.items()}


def test_tensors_and_layers_are_paired_by_name() -> None:
    first, second = on_ranks(2, in_any_order)
    assert first == second
    for name in "abc":
        assert first[f"{name}.weight"] == [ord(name) + 0.5]
        assert first[f"{name}.running_mean"] == pytest.approx([(ord(name) + 1.5) * 0.1])


def tied(first: str, second: str) -> nn.Module:
    module = nn.ModuleDict(
        {first: nn.Linear(1, 1, bias=False), second: nn.Linear(1, 1, bias=False)}
    )
    module[second].weight = module[first].weight
    return module


def tied_in_any_order() -> list[float]:
    rank = dist.get_rank()
    module = tied(*("ab" if rank == 0 else "ba"))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(rank)
    average_model(module, 0.5)
    return [parameter.item() for parameter in module.parameters()]


def test_a_tensor_with_two_names_is_averaged_once() -> None:
    assert on_ranks(2, tied_in_any_order) == [[0.5]] * 2


def error_of(function: Callable[[], None]) -> str:
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors_of_unlike_models() -> dict[str, str]:
    """Of widths that no other test has: the ranks remember what they have compared."""
    rank = dist.get_rank()
    models = {
        "width": network(width=31 + rank),
        "dtype": network(width=41).double() if rank else network(width=41),
        "head": network(width=51, classes=2 + rank),
    }
    found = {f"step, {name}": error_of(lambda m=m: step(m)) for name, m in models.items()}  # type: ignore[misc]
    for name, module in models.items():
        found[f"average, {name}"] = error_of(lambda m=module: average_model(m, 0.5))  # type: ignore[misc]
    return found


EXPECTED = {
    "step, width": "ValueError: the ranks' BN layers differ: "
    "1 is 32 channels, float32 on rank 1 and 31 channels, float32 on rank 0",
    "step, dtype": "ValueError: the ranks' BN layers differ: "
    "1 is 41 channels, float64 on rank 1 and 41 channels, float32 on rank 0",
    "step, head": "no error",
    "average, width": "ValueError: the ranks' models differ: 0.bias is (32,) float32 on rank 1 and "
    "(31,) float32 on rank 0; 0.weight is (32, 4) float32 on rank 1 and (31, 4) float32 on rank 0; "
    "1.bias is (32,) float32 on rank 1 and (31,) float32 on rank 0; and 4 more",
    "average, dtype": "ValueError: the ranks' models differ: 0.bias is (41,) float64 on rank 1 and "
    "(41,) float32 on rank 0; 0.weight is (41, 4) float64 on rank 1 and (41, 4) float32 on rank 0; "
    "1.bias is (41,) float64 on rank 1 and (41,) float32 on rank 0; and 5 more",
    "average, head": "ValueError: the ranks' models differ: 2.bias is (3,) float32 on rank 1 and "
    "(2,) float32 on rank 0; 2.weight is (3, 51) float32 on rank 1 and (2, 51) float32 on rank 0",
}


def test_what_differs_between_the_models_is_named_on_every_rank() -> None:
    assert on_ranks(2, errors_of_unlike_models) == [EXPECTED] * 2


def collectives_of_copies() -> list[int]:
    module, found = network(width=61), []
    for model in (module, module, copy.deepcopy(module), network(width=61)):
        before = progress.collectives
        step(model)
        average_models([model, copy.deepcopy(model)], [0.25, 0.25])
        found.append(progress.collectives - before)
    return found


def test_models_are_compared_at_their_first_use_only() -> None:
    for first, *others in on_ranks(2, collectives_of_copies):
        assert first == others[0] + 2
        assert len(set(others)) == 1


def steps(models: Sequence[nn.Module], weight: float) -> None:
    for model in models:
        step(model, weight)


def count_alike() -> None:
    """Makes the ranks' numbers of conversions equal: they keep those of earlier tests."""
    conversion._number_of_conversions[0] = 10_000


def swapped(rank_0_has_more: bool) -> str:
    """Two models with equal layers, which rank 1 runs in the other order."""
    rank = dist.get_rank()
    count_alike()
    models = [network(width=91 + rank_0_has_more) for _ in range(2)]
    if rank == 0 and rank_0_has_more:
        network()
    order = models if rank == 0 else models[::-1]
    weight = (0.5, 0.5, 0.0)[rank]
    return error_of(lambda: steps(order, weight))


def test_equal_models_in_another_order_are_noticed() -> None:
    for message in on_ranks(2, swapped, False):
        assert re.match(r"RuntimeError: the ranks are at different models: .*on rank 1", message)


def test_ranks_that_convert_more_models_are_not_accused() -> None:
    assert on_ranks(3, swapped, True) == ["no error"] * 3


def swapped_later() -> str:
    rank = dist.get_rank()
    count_alike()
    models = [network(width=71) for _ in range(2)]
    for model in models:
        step(model)
    return error_of(lambda: step(models[rank]))


def test_equal_models_in_another_order_are_noticed_later() -> None:
    for message in on_ranks(2, swapped_later):
        assert message.startswith("RuntimeError: the ranks are at different calls: rank")


def unlike_numbers_of_clients() -> None:
    """Rank 0 has two clients, each with a model that was converted by itself."""
    models = [network() for _ in range(2 - dist.get_rank())]
    weights = [0.25, 0.25] if dist.get_rank() == 0 else [0.5]
    x = randn(5, 4).float()
    losses = [lambda m=model: m(x).square().sum() for model in models]
    for _ in range(2):
        federated_backward(models, losses, weights)


def test_ranks_may_have_unlike_numbers_of_clients() -> None:
    on_ranks(2, unlike_numbers_of_clients)


def steps_then_average(number: Sequence[int], is_first: bool) -> str:
    rank, model = dist.get_rank(), network(width=81 + is_first)
    if not is_first:
        step(model)
        average_model(model, 0.5)

    def loop() -> None:
        steps([model] * number[rank], 0.5)
        average_model(model, 0.5)

    return error_of(loop)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("number", [[1, 2], [2, 1]])
def test_ranks_at_different_calls_are_told_both_calls(number: list[int], is_first: bool) -> None:
    early = number.index(1)
    for message in on_ranks(2, steps_then_average, number, is_first, seconds=30):
        assert message.startswith("RuntimeError: the ranks are at different calls: ")
        assert f"rank {early} at the average of the models" in message
        assert f"rank {1 - early} at BN layer 1 (forward)" in message


class LostStore:
    """A store whose server has ended with its rank."""

    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("store: Broken pipe")

    def set(self, key: str, text: str) -> None:
        raise RuntimeError("store: Broken pipe")


def error_of_a_lost_rank() -> str:
    def fail(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.distributed_c10d, "_get_default_store", LostStore)
        patch.setattr(collectives, "_sum", fail)
        return error_of(lambda: average_model(network(width=101), 0.5))


def test_a_lost_rank_stays_the_error_if_its_store_is_lost_too() -> None:
    for message in on_ranks(2, error_of_a_lost_rank):
        assert message == "RuntimeError: Connection closed by peer"
