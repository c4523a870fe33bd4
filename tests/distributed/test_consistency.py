"""The check that all ranks hold one model sees every changed bit, name, dtype and shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedtan_hpc.distributed.consistency import ranks_that_differ
from fedtan_hpc.distributed.counters import progress, training_traffic
from tests.distributed.mixed_model import Mixed, mixed
from tests.helpers.ranks import on_ranks

INT_OF_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def set_first(value: Tensor, bits: int) -> None:
    value.view(-1).view(INT_OF_WIDTH[value.element_size()])[0] = bits


def set_last(value: Tensor, bits: int) -> None:
    value.view(-1).view(INT_OF_WIDTH[value.element_size()])[-1] = bits


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
    """Returns a model with zeros and NaN, equal on all ranks."""
    module = mixed(5)
    for value in (module.norm.bias.data, module.norm.weight.data, module.double_.weight.data):
        value.view(-1)[0] = 0.0
    for value in (module.norm.weight.data, module.double_.weight.data):
        value.view(-1)[-1] = torch.nan
    return module


def differing(change: Callable[[Mixed], None], changed: list[int]) -> list[int]:
    """Returns the ranks that differ after ``change`` on the ranks ``changed``."""
    module = special()
    if dist.get_rank() in changed:
        change(module)
    return ranks_that_differ(module)


def differing_ranks() -> dict[str, list[int]]:
    before = training_traffic.copy()
    by_case = {change.__name__: differing(change, [1]) for change in CHANGES}
    by_case["nothing"] = differing(nothing, [0, 1, 2])
    by_case["two ranks"] = differing(one_ulp, [1, 2])
    by_case["rank 0"] = differing(one_ulp, [0])
    assert training_traffic == before
    return by_case


@cache
def differing_by_rank() -> list[dict[str, list[int]]]:
    return on_ranks(3, differing_ranks)


@pytest.mark.parametrize("change", [change.__name__ for change in CHANGES])
def test_a_rank_whose_model_differs_is_named_on_every_rank(change: str) -> None:
    assert [by_case[change] for by_case in differing_by_rank()] == [[1]] * 3


@pytest.mark.parametrize(
    ("case", "expected"), [("nothing", []), ("two ranks", [1, 2]), ("rank 0", [1, 2])]
)
def test_ranks_are_compared_with_rank_0(case: str, expected: list[int]) -> None:
    assert [by_case[case] for by_case in differing_by_rank()] == [expected] * 3


BIT_TYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int64]


def unseen_bits(dtype: torch.dtype) -> list[int]:
    """Returns the bits of a ``dtype`` value whose change on rank 1 the check does not see."""
    width = torch.empty(0, dtype=dtype).element_size()
    unseen = []
    for bit in range(8 * width):
        module = nn.Module()
        module.register_buffer("values", torch.full((3,), 5).to(dtype))
        if dist.get_rank() == 1:
            sign = -1 if bit == 8 * width - 1 else 1
            module.get_buffer("values").view(INT_OF_WIDTH[width])[1] ^= sign * 2**bit
        if ranks_that_differ(module) != [1]:
            unseen.append(bit)
    return unseen


def unseen_bits_by_type() -> dict[torch.dtype, list[int]]:
    return {dtype: unseen_bits(dtype) for dtype in BIT_TYPES}


@cache
def unseen_bits_by_rank() -> list[dict[torch.dtype, list[int]]]:
    return on_ranks(2, unseen_bits_by_type)


@pytest.mark.parametrize("dtype", BIT_TYPES, ids=str)
def test_no_single_bit_passes_unseen(dtype: torch.dtype) -> None:
    assert [by_type[dtype] for by_type in unseen_bits_by_rank()] == [[], []]


def test_one_rank_alone_agrees_with_itself() -> None:
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


def layouts() -> dict[str, list[int]]:
    """Returns the ranks that differ where bytes agree and names, dtypes or shapes do not."""
    is_first = dist.get_rank() == 0
    values = torch.arange(6, dtype=torch.float32)
    pairs = {
        "shape": (values.view(2, 3), values.view(3, 2)),
        "dtype": (values, values.view(torch.int32)),
        "strides": (values.view(2, 3), values.view(2, 3).t().contiguous().t()),
    }
    by_case = {}
    for case, (first, second) in pairs.items():
        module = nn.Module()
        module.register_buffer("values", first if is_first else second)
        by_case[case] = ranks_that_differ(module)
    module = nn.Module()
    module.register_buffer("values" if is_first else "others", values)
    by_case["name"] = ranks_that_differ(module)
    return by_case


def test_names_dtypes_and_shapes_count_and_memory_formats_do_not() -> None:
    expected = {"shape": [1], "dtype": [1], "strides": [], "name": [1]}
    assert on_ranks(2, layouts) == [expected] * 2


def collectives_of_a_check() -> int:
    before = progress.collectives
    ranks_that_differ(mixed(dist.get_rank()))
    return progress.collectives - before


def test_a_check_is_one_collective() -> None:
    assert on_ranks(2, collectives_of_a_check) == [1, 1]
