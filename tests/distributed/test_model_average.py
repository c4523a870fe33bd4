"""The model average on several ranks, and the check that all ranks hold one model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedtan_hpc import average_model
from fedtan_hpc.distributed.consistency import ranks_that_differ
from fedtan_hpc.distributed.counters import training_traffic
from tests.helpers import networks
from tests.helpers.ranks import on_ranks

Values = dict[str, Tensor]

WIDTH_OF_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Mixed(nn.Module):
    """Every element type that a model may hold, a shared parameter and counters."""

    def __init__(self) -> None:
        super().__init__()
        self.single = nn.Conv2d(3, 4, 2)
        self.single.weight.data = self.single.weight.data.to(memory_format=torch.channels_last)
        self.double_ = nn.Linear(3, 2, dtype=torch.float64)
        self.half_ = nn.Linear(5, 3, dtype=torch.bfloat16)
        self.wave = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        self.long_wave = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex128))
        self.norm = nn.BatchNorm1d(4)
        self.again = self.double_
        self.same_weight = self.double_.weight
        self.register_buffer("mask", torch.tensor([True, False]))


def mixed(seed: int) -> Mixed:
    """The model with values that depend on ``seed``."""
    module, generator = Mixed(), torch.Generator().manual_seed(seed)
    for value in module.state_dict().values():
        if value.is_floating_point() or value.is_complex():
            value.copy_(torch.randn(value.shape, dtype=torch.float64, generator=generator))
            if value.is_complex():
                value.imag.copy_(torch.randn(value.shape, generator=generator))
    module.norm.get_buffer("num_batches_tracked").fill_(seed)
    return module


def state(module: nn.Module) -> Values:
    return {name: value.clone() for name, value in module.state_dict().items()}


def averaged(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def expected_average(p: list[float]) -> Values:
    """The float64 mean of the ranks' models."""
    states = [mixed(rank).state_dict() for rank in range(len(p))]
    names = [name for name, value in states[0].items() if averaged(value)]
    return {
        name: torch.stack(
            [w * s[name].to(torch.complex128) for w, s in zip(p, states, strict=True)]
        ).sum(0)
        for name in names
    }


def assert_is_average(found: Values, expected: Values) -> None:
    for name, value in expected.items():
        part = torch.view_as_real(found[name]) if found[name].is_complex() else found[name]
        bound = 1e-15 if part.dtype == torch.float64 else torch.finfo(part.dtype).eps
        error = (found[name].to(torch.complex128) - value).abs().max()
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
    measured = on_ranks(len(p), average_on_this_rank, p)
    expected = expected_average(p)
    for found in measured:
        assert_is_average(found, expected)
        assert all(torch.equal(found[name], measured[0][name]) for name in expected)


def test_a_network_in_float64_is_averaged_to_rounding() -> None:
    p = networks.weights(3)
    states = [state_of_network(rank) for rank in range(3)]
    for found in on_ranks(3, averaged_network, p):
        for name, value in found.items():
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


def test_counters_and_masks_stay_each_ranks_own() -> None:
    for rank, found in enumerate(on_ranks(2, average_on_this_rank, [0.5, 0.5])):
        assert found["norm.num_batches_tracked"] == rank
        assert found["mask"].tolist() == [True, False]


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
    payload = 4 * (2 + single) + 8 * (2 + double) + 4 * (2 + half)
    assert on_ranks(2, traffic_and_strides) == [(3, payload, True, True)] * 2


def average_with_broken_rank(p: list[float]) -> Values:
    """The average when ranks of weight 0 hold nothing but NaN."""
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
    for found in on_ranks(3, average_with_broken_rank, p):
        assert_is_average(found, expected_average(p))


def average_in_pairs() -> Values:
    """Ranks 0 and 2 average with each other, rank 1 is alone."""
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


def assert_same_bits(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


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
    """The error and the model after it, for each bad case for so many ranks."""
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
        message, found = outcomes[name]
        assert "weights" in (message or "no error")
        assert_same_bits(found, state(mixed(rank)))


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


# Agreement


def set_first(value: Tensor, bits: int) -> None:
    value.view(-1).view(WIDTH_OF_BITS[value.element_size()])[0] = bits


def set_last(value: Tensor, bits: int) -> None:
    value.view(-1).view(WIDTH_OF_BITS[value.element_size()])[-1] = bits


def nothing(module: Mixed) -> None:
    pass


def one_ulp(module: Mixed) -> None:
    module.norm.bias.data.view(torch.int32)[-1] += 1


def one_half_ulp(module: Mixed) -> None:
    module.half_.weight.data.view(torch.int16)[-1, -1] += 1


def counter(module: Mixed) -> None:
    module.norm.get_buffer("num_batches_tracked").add_(1)


def flag(module: Mixed) -> None:
    module.get_buffer("mask").logical_not_()


def imaginary_part(module: Mixed) -> None:
    module.long_wave.data.imag[-1, -1] *= 1 + 2e-16


def order(module: Mixed) -> None:
    module.norm.bias.data.copy_(module.norm.bias.data.flip(0))


def zero_or_minus_zero(module: Mixed) -> None:
    set_first(module.norm.bias.data, -(2**31))


def zero_or_minus_zero_in_float64(module: Mixed) -> None:
    set_first(module.double_.weight.data, -(2**63))


def payload_of_nan(module: Mixed) -> None:
    set_last(module.norm.weight.data, 0x7FC00001)


def payload_of_nan_in_float64(module: Mixed) -> None:
    set_last(module.double_.weight.data, 0x7FF8000000000001)


CHANGES: list[Callable[[Mixed], None]] = [
    one_ulp,
    one_half_ulp,
    counter,
    flag,
    imaginary_part,
    order,
    zero_or_minus_zero,
    zero_or_minus_zero_in_float64,
    payload_of_nan,
    payload_of_nan_in_float64,
]


def special() -> Mixed:
    """A model with zeros and NaN, the same on every rank."""
    module = mixed(5)
    for value in (module.norm.bias.data, module.norm.weight.data, module.double_.weight.data):
        value.view(-1)[0] = 0.0
    for value in (module.norm.weight.data, module.double_.weight.data):
        value.view(-1)[-1] = torch.nan
    return module


def differing(change: Callable[[Mixed], None], changed: list[int]) -> list[int]:
    """What is found after ``change`` on the ranks ``changed``."""
    module = special()
    if dist.get_rank() in changed:
        change(module)
    return ranks_that_differ(module)


def differing_ranks() -> dict[str, list[int]]:
    before = training_traffic.copy()
    found = {change.__name__: differing(change, [1]) for change in CHANGES}
    found["nothing"] = differing(nothing, [0, 1, 2])
    found["two ranks"] = differing(one_ulp, [1, 2])
    found["rank 0"] = differing(one_ulp, [0])
    assert training_traffic == before
    return found


@cache
def differing_by_rank() -> list[dict[str, list[int]]]:
    return on_ranks(3, differing_ranks)


@pytest.mark.parametrize("change", [change.__name__ for change in CHANGES])
def test_a_rank_whose_model_differs_is_named_on_every_rank(change: str) -> None:
    assert [found[change] for found in differing_by_rank()] == [[1]] * 3


@pytest.mark.parametrize(
    ("case", "expected"), [("nothing", []), ("two ranks", [1, 2]), ("rank 0", [1, 2])]
)
def test_ranks_are_compared_with_rank_0(case: str, expected: list[int]) -> None:
    assert [found[case] for found in differing_by_rank()] == [expected] * 3


BIT_TYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int64]


def bits_that_pass_unseen(dtype: torch.dtype) -> list[int]:
    """Bits of a value of ``dtype`` whose change on rank 1 nobody notices."""
    width = torch.empty(0, dtype=dtype).element_size()
    unseen = []
    for bit in range(8 * width):
        module = nn.Module()
        module.register_buffer("values", torch.full((3,), 5).to(dtype))
        if dist.get_rank() == 1:
            sign = -1 if bit == 8 * width - 1 else 1
            module.get_buffer("values").view(WIDTH_OF_BITS[width])[1] ^= sign * 2**bit
        if ranks_that_differ(module) != [1]:
            unseen.append(bit)
    return unseen


def unseen_bits_by_type() -> dict[torch.dtype, list[int]]:
    return {dtype: bits_that_pass_unseen(dtype) for dtype in BIT_TYPES}


@cache
def unseen_bits_by_rank() -> list[dict[torch.dtype, list[int]]]:
    return on_ranks(2, unseen_bits_by_type)


@pytest.mark.parametrize("dtype", BIT_TYPES, ids=str)
def test_no_single_bit_passes_unseen(dtype: torch.dtype) -> None:
    assert [found[dtype] for found in unseen_bits_by_rank()] == [[], []]


def test_one_client_alone_agrees_with_itself() -> None:
    assert ranks_that_differ(mixed(1)) == []


def models_whose_changes_cancel_in_a_linear_sum() -> list[int]:
    module = nn.Linear(2, 1, bias=False)
    bits = torch.tensor([[1_000_000_000, 1_000_000_000]], dtype=torch.int32)
    if dist.get_rank() == 1:
        bits += torch.tensor([[3, -1]], dtype=torch.int32)
    module.weight.data = bits.view(torch.float32)
    return ranks_that_differ(module)


def test_changes_that_cancel_in_a_linear_checksum_are_seen() -> None:
    assert on_ranks(2, models_whose_changes_cancel_in_a_linear_sum) == [[1], [1]]


def test_a_module_without_tensors_agrees() -> None:
    assert ranks_that_differ(nn.ReLU()) == []
