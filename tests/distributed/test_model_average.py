"""The model average on several ranks: values, messages, groups and bad weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedtan_hpc import average_model
from fedtan_hpc.distributed.counters import training_traffic
from tests.distributed.mixed_model import Mixed, mixed
from tests.helpers import networks
from tests.helpers.ranks import on_ranks

Values = dict[str, Tensor]


def state(module: nn.Module) -> Values:
    return {name: value.clone() for name, value in module.state_dict().items()}


def averaged(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def expected_average(p: list[float]) -> Values:
    """Returns the mean of the ranks' models in double precision."""
    states = [mixed(rank).state_dict() for rank in range(len(p))]
    names = [name for name, value in states[0].items() if averaged(value)]
    return {
        name: torch.stack(
            [w * s[name].to(torch.complex128) for w, s in zip(p, states, strict=True)]
        ).sum(0)
        for name in names
    }


def assert_is_average(result: Values, expected: Values) -> None:
    for name, value in expected.items():
        part = torch.view_as_real(result[name]) if result[name].is_complex() else result[name]
        bound = 1e-15 if part.dtype == torch.float64 else torch.finfo(part.dtype).eps
        error = (result[name].to(torch.complex128) - value).abs().max()
        assert error <= 4 * bound * value.abs().max(), name


def average_on_this_rank(p: list[float]) -> Values:
    rank = dist.get_rank()
    module = mixed(rank)
    average_model(module, p[rank])
    return state(module)


@pytest.mark.parametrize(
    "p", [[0.25, 0.75], [0.2, 0.5, 0.3], [1.0, 0.0], [1e-8, 1 - 1e-8]], ids=str
)
def test_the_model_becomes_the_weighted_mean_in_every_element_type(p: list[float]) -> None:
    results = on_ranks(len(p), average_on_this_rank, p)
    expected = expected_average(p)
    for result in results:
        assert_is_average(result, expected)
        assert all(torch.equal(result[name], results[0][name]) for name in expected)


def test_a_network_in_float64_is_averaged_to_rounding() -> None:
    p = networks.weights(3)
    states = [state_of_network(rank) for rank in range(3)]
    for result in on_ranks(3, averaged_network, p):
        for name, value in result.items():
            if averaged(value):
                mean = torch.stack([w * s[name] for w, s in zip(p, states, strict=True)]).sum(0)
                torch.testing.assert_close(value, mean, rtol=1e-12, atol=1e-14)


def network_of(rank: int) -> nn.Module:
    module = networks.network("2d")
    for value in module.state_dict().values():
        value.add_(rank) if averaged(value) else value.fill_(rank)
    return module


def state_of_network(rank: int) -> Values:
    return state(network_of(rank))


def averaged_network(p: list[float]) -> Values:
    module = network_of(dist.get_rank())
    average_model(module, p[dist.get_rank()])
    return state(module)


def test_counters_and_masks_are_not_averaged() -> None:
    for rank, result in enumerate(on_ranks(2, average_on_this_rank, [0.5, 0.5])):
        assert result["norm.num_batches_tracked"] == rank
        assert result["mask"].tolist() == [True, False]


def traffic_and_strides() -> tuple[int, int, bool, bool]:
    rank = dist.get_rank()
    module, before = mixed(rank), training_traffic.copy()
    tensors = list(module.parameters())
    average_model(module, (0.25, 0.75)[rank])
    used = training_traffic.since(before)
    kept = all(a is b for a, b in zip(module.parameters(), tensors, strict=True))
    in_format = module.single.weight.is_contiguous(memory_format=torch.channels_last)
    return used.messages, used.bytes, kept, in_format


def test_there_is_one_message_for_each_element_type_and_memory_stays_in_place() -> None:
    module = Mixed()
    single = sum(v.numel() for v in [*module.single.parameters(), *module.norm.parameters()])
    single += 2 * module.wave.numel() + 2 * 4
    double = sum(v.numel() for v in module.double_.parameters()) + 2 * module.long_wave.numel()
    half = sum(v.numel() for v in module.half_.parameters())
    payload = 4 * (4 + single) + 8 * (4 + double) + 4 * (4 + half)
    assert on_ranks(2, traffic_and_strides) == [(3, payload, True, True)] * 2


def average_with_broken_rank(p: list[float]) -> Values:
    """Averages where all values of ranks with weight 0 are NaN."""
    rank = dist.get_rank()
    module = mixed(rank)
    if p[rank] == 0:
        for value in module.state_dict().values():
            if averaged(value):
                value.fill_(torch.nan)
    average_model(module, p[rank])
    return state(module)


def test_a_rank_without_weight_adds_nothing_and_receives_the_average() -> None:
    p = [0.4, 0.0, 0.6]
    for result in on_ranks(3, average_with_broken_rank, p):
        assert_is_average(result, expected_average(p))


def average_in_pairs() -> Values:
    """Averages between ranks 0 and 2, and on rank 1 alone."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    module = mixed(rank)
    average_model(module, (0.25, 1.0, 0.75)[rank], group=groups[rank % 2])
    return state(module)


def test_groups_average_among_themselves() -> None:
    first, alone, second = on_ranks(3, average_in_pairs)
    expected = expected_average([0.25, 0.0, 0.75])
    assert_is_average(first, expected)
    assert_is_average(second, expected)
    assert_same_bits(alone, state(mixed(1)))


def assert_same_bits(result: Values, expected: Values) -> None:
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], value) for name, value in expected.items())


BAD_WEIGHTS = {
    "negative": [-0.5, 1.5],
    "NaN": [float("nan"), 1.0],
    "infinite": [1.0, float("inf")],
    "more than 1": [0.5, 0.6],
    "beyond float32": [1e300, 0.5],
    "all zero": [0.0, 0.0],
    "too much for float64 alone": [0.5, 0.5 + 1.2e-6],
    "two of three": [0.3, -1.0, float("nan")],
    "less than 1": [0.3, 0.3, 0.3],
}


def outcomes_of_bad_weights() -> dict[str, tuple[str | None, Values]]:
    """Returns error and model for each bad case that has as many weights as there are ranks."""
    cases = {name: p for name, p in BAD_WEIGHTS.items() if len(p) == dist.get_world_size()}
    return {name: outcome_of_bad_weights(p[dist.get_rank()]) for name, p in cases.items()}


def outcome_of_bad_weights(weight: float) -> tuple[str | None, Values]:
    module, message = mixed(dist.get_rank()), None
    try:
        average_model(module, weight)
    except ValueError as error:
        message = str(error)
    return message, state(module)


@cache
def bad_weights_by_rank(clients: int) -> list[dict[str, tuple[str | None, Values]]]:
    return on_ranks(clients, outcomes_of_bad_weights)


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_raise_on_every_rank_and_leave_the_model(name: str) -> None:
    for rank, outcomes in enumerate(bad_weights_by_rank(len(BAD_WEIGHTS[name]))):
        message, model = outcomes[name]
        assert "weights" in (message or "no error")
        assert_same_bits(model, state(mixed(rank)))


def test_one_client_alone_keeps_its_model() -> None:
    module = mixed(3)
    average_model(module, weight=1.0)
    assert_same_bits(state(module), state(mixed(3)))


@pytest.mark.parametrize("weight", [0.5, 0.0, -1.0, float("nan")])
def test_one_client_alone_has_weight_1(weight: float) -> None:
    module = mixed(3)
    with pytest.raises(ValueError, match="weights"):
        average_model(module, weight)
    assert_same_bits(state(module), state(mixed(3)))
