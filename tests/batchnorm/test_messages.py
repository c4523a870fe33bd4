"""Packing, adding and reading messages of simulated clients, against exact fractions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from fedtan_hpc.batchnorm import messages
from fedtan_hpc.batchnorm.messages import ClientWeights, GlobalMoments

Exact: TypeAlias = tuple[Fraction, Fraction]
"""Mean and variance of one channel."""

CHANNELS = 16
WEIGHTS = {
    "one client": [1.0],
    "two clients": [0.3, 0.7],
    "three clients": [0.2, 0.5, 0.3],
    "four clients": [0.1, 0.2, 0.3, 0.4],
    "a weight of 1e-8": [0.75 - 1e-8, 1e-8, 0.25],
    "all but 1e-8 on one client": [1 - 1e-8, 1e-8],
}


def batches(clients: int, offset: float) -> list[Tensor]:
    """(n, C) per client, each with its own n, spread near 1 and mean near ``offset``."""
    generator = torch.Generator().manual_seed(clients)
    return [
        offset + 0.3 * k + (0.6 + 0.2 * k) * torch.randn(n, CHANNELS, generator=generator).double()
        for k, n in enumerate((5, 8, 3, 6)[:clients])
    ]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.var(0, unbiased=False)


def combine(p: list[float], xs: list[Tensor]) -> GlobalMoments:
    packed = [
        messages.pack_moments(4, ClientWeights([p_k], [len(x)]), *moments(x))
        for p_k, x in zip(p, xs, strict=True)
    ]
    return messages.unpack_moments(torch.stack(packed).sum(0), CHANNELS)


def naive_variance(p: list[float], xs: list[Tensor]) -> Tensor:
    """sum p (v + m^2) - (sum p m)^2 in float64."""
    local = [moments(x) for x in xs]
    mean = torch.stack([p_k * m for p_k, (m, _) in zip(p, local, strict=True)]).sum(0)
    second = torch.stack([p_k * (v + m * m) for p_k, (m, v) in zip(p, local, strict=True)]).sum(0)
    return second - mean * mean


def total(values: Iterable[Fraction]) -> Fraction:
    return sum(values, Fraction(0))


def fractions_of_moments(p: list[float], local: list[tuple[float, float]]) -> Exact:
    """Mean and variance of one channel from the clients' (mean, variance)."""
    exact = [(Fraction(w), Fraction(m), Fraction(v)) for w, (m, v) in zip(p, local, strict=True)]
    weights = total(w for w, _, _ in exact)
    mean = total(w * m for w, m, _ in exact) / weights
    return mean, total(w * (v + (m - mean) ** 2) for w, m, v in exact) / weights


def exact_from_moments(p: list[float], xs: list[Tensor]) -> list[Exact]:
    local = [moments(x) for x in xs]
    return [
        fractions_of_moments(p, [(m[c].item(), v[c].item()) for m, v in local])
        for c in range(CHANNELS)
    ]


def exact_from_values(p: list[float], xs: list[Tensor]) -> list[Exact]:
    weights = total(map(Fraction, p))
    found = []
    for c in range(CHANNELS):
        columns = [[Fraction(value) for value in x[:, c].tolist()] for x in xs]
        parts = [(Fraction(w) / weights / len(x), x) for w, x in zip(p, columns, strict=True)]
        mean = total(w * total(column) for w, column in parts)
        variance = total(w * total((v - mean) ** 2 for v in column) for w, column in parts)
        found.append((mean, variance))
    return found


def worst_error(measured: Tensor, exact: list[Fraction]) -> float:
    pairs = zip(measured.tolist(), exact, strict=True)
    return max(abs(float(Fraction(value) / truth - 1)) for value, truth in pairs)


def errors(name: str, offset: float, truth: Callable[..., list[Exact]]) -> tuple[float, float]:
    """Worst relative errors of mean and variance."""
    p = WEIGHTS[name]
    xs = batches(len(p), offset)
    found, exact = combine(p, xs), truth(p, xs)
    mean_error = worst_error(found.mean_C, [mean for mean, _ in exact])
    return mean_error, worst_error(found.variance_C, [variance for _, variance in exact])


@pytest.mark.parametrize(("offset", "bound"), [(1.0, 1e-15), (1e3, 1e-15), (1e6, 3e-10)])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_sum_of_messages_holds_the_moments_far_from_zero(
    name: str, offset: float, bound: float
) -> None:
    mean_error, variance_error = errors(name, offset, exact_from_moments)
    assert mean_error < 1e-15
    assert variance_error < bound


@pytest.mark.parametrize(("offset", "bound"), [(1.0, 2e-15), (1e3, 1e-12), (1e6, 1e-9)])
@pytest.mark.parametrize("name", WEIGHTS)
def test_moments_of_the_values_themselves_survive_the_messages(
    name: str, offset: float, bound: float
) -> None:
    mean_error, variance_error = errors(name, offset, exact_from_values)
    assert mean_error < 2e-15
    assert variance_error < bound


@pytest.mark.parametrize(("offset", "at_least"), [(1e3, 1e-10), (1e6, 1e-5)])
@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "one client"])
def test_the_plain_difference_of_float64_moments_would_not_do(
    name: str, offset: float, at_least: float
) -> None:
    p = WEIGHTS[name]
    xs = batches(len(p), offset)
    exact = [variance for _, variance in exact_from_moments(p, xs)]
    assert worst_error(naive_variance(p, xs), exact) > at_least


def test_equal_values_everywhere_have_variance_zero() -> None:
    found = combine(
        [0.25, 0.75], [torch.full((n, CHANNELS), 1e6 + 0.1, dtype=torch.float64) for n in (4, 9)]
    )
    assert torch.all(found.variance_C >= 0)
    assert torch.all(found.variance_C < 1e-9)


@pytest.mark.parametrize("offset", [1.0, 1e2, 1e4, 1e6])
def test_float32_moments_lose_less_than_values_of_24_bits_have_lost(offset: float) -> None:
    """Rounding values adds a twelfth of their spacing, squared, to their variance."""
    p, xs = [0.4, 0.6], [x.float() for x in batches(2, offset)]
    found, exact = combine(p, xs), exact_from_moments(p, xs)
    assert worst_error(found.mean_C, [mean for mean, _ in exact]) < 1e-15
    for value, (mean, variance) in zip(found.variance_C.tolist(), exact, strict=True):
        spacing = 2.0**-23 * 2.0 ** math.floor(math.log2(abs(mean) + variance))
        assert abs(value - float(variance)) < spacing**2 / 12 + 1e-15 * float(variance)


def test_the_count_leaves_out_clients_without_weight() -> None:
    assert combine([0.4, 0.0, 0.6], batches(3, 0.0)).count == 5 + 3


@pytest.mark.parametrize(
    "share",
    [ClientWeights([0.0], [4]), ClientWeights([-1.0], [4]), ClientWeights([float("nan")], [4])],
)
def test_a_client_that_takes_no_part_sends_zeros_whatever_it_holds(share: ClientWeights) -> None:
    broken = torch.full((CHANNELS,), torch.nan, dtype=torch.float64)
    packed = messages.pack_moments(4, share, broken, broken)
    assert packed[4:].count_nonzero() == 0
    sums = messages.pack_derivatives(5, share, torch.cat([broken, broken]))
    assert messages.unpack_derivatives(sums).count_nonzero() == 0


def test_derivatives_are_added_with_their_weights() -> None:
    p = [0.2, 0.5, 0.3]
    sums = torch.randn(3, 2 * CHANNELS, generator=torch.Generator().manual_seed(0)).double()
    packed = [
        messages.pack_derivatives(5, ClientWeights([w], [4]), s)
        for w, s in zip(p, sums, strict=True)
    ]
    expected = torch.tensor(p, dtype=torch.float64) @ sums
    found = messages.unpack_derivatives(torch.stack(packed).sum(0))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize(("dtype", "forward"), [(torch.float32, 2), (torch.float64, 4)])
def test_message_sizes(channels: int, dtype: torch.dtype, forward: int) -> None:
    """7 + 2C, or of float64 moments 7 + 4C, and 2 + 2C."""
    ones = torch.ones(channels, dtype=dtype)
    there = messages.pack_moments(2, ClientWeights([1.0], [4]), ones, ones)
    back = messages.pack_derivatives(3, ClientWeights([1.0], [4]), ones.repeat(2))
    assert (there.numel(), back.numel()) == (7 + forward * channels, 2 + 2 * channels)
    assert (there.dtype, back.dtype) == (torch.float64, torch.float64)


def forward_message(tag: int, ranks: int) -> Tensor:
    one = torch.ones(1, dtype=torch.float64)
    return messages.pack_moments(tag, ClientWeights([1 / ranks], [4]), one, one)


def backward_message(tag: int, ranks: int) -> Tensor:
    return messages.pack_derivatives(
        tag, ClientWeights([1 / ranks], [4]), torch.ones(2, dtype=torch.float64)
    )


def ranks_that_notice(
    pack: Callable[[int, int], Tensor], check: Callable[[Tensor, int, int], None], tags: list[int]
) -> int:
    """How many ranks' checks raise when rank k sends ``tags[k]``."""
    total = torch.stack([pack(tag, len(tags)) for tag in tags]).sum(0)
    noticed = 0
    for tag in tags:
        try:
            check(total, tag, len(tags))
        except RuntimeError:
            noticed += 1
    return noticed


DIRECTIONS = [
    pytest.param(forward_message, messages.check_moments, id="forward"),
    pytest.param(backward_message, messages.check_derivatives, id="backward"),
]
TAG_SETS = {
    "small": [2, 3, 4, 5, 7],
    "large": [2, 1_000_003, 2**24, 2**24 + 1, 2**25 - 1],
}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("tags", TAG_SETS)
@pytest.mark.parametrize(("pack", "check"), DIRECTIONS)
def test_every_rank_notices_any_mix_of_tags(
    pack: Callable[[int, int], Tensor],
    check: Callable[[Tensor, int, int], None],
    tags: str,
    ranks: int,
) -> None:
    for mix in itertools.combinations_with_replacement(TAG_SETS[tags], ranks):
        expected = ranks if len(set(mix)) > 1 else 0
        assert ranks_that_notice(pack, check, list(mix)) == expected, mix


def checked(p: list[float], counts: list[int]) -> None:
    """Check the message of clients with these weights and batch sizes."""
    one = torch.ones(2, dtype=torch.float64)
    packed = [
        messages.pack_moments(2, ClientWeights([w], [n]), one, one)
        for w, n in zip(p, counts, strict=True)
    ]
    messages.check_moments(torch.stack(packed).sum(0), 2, len(p))


@pytest.mark.parametrize("excess", [0.0, 5e-7, -5e-7])
def test_weights_may_miss_1_by_rounding(excess: float) -> None:
    checked([0.5, 0.5 + excess], [2, 2])


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ([0.5, 0.5 + 2e-6], "sum to 1.000002 over 2 ranks"),
        ([0.5, 0.5 - 2e-6], "sum to 0.999998 over 2 ranks"),
        ([0.0, 0.0], "sum to 0 over 2 ranks"),
        ([-0.5, 1.5], "1 weights on 2"),
        ([float("nan"), float("inf")], "2 weights on 2"),
        ([1e300, 1e300], "sum to"),
    ],
)
def test_weights_that_are_not_shares_of_1_are_refused(p: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(p, [2, 2])


def test_an_empty_batch_that_counts_is_refused() -> None:
    with pytest.raises(ValueError, match="1 batches are empty"):
        checked([0.5, 0.5], [2, 0])


def test_one_value_in_all_has_no_variance() -> None:
    with pytest.raises(ValueError, match="a variance needs two"):
        checked([1.0, 0.0], [1, 5])
