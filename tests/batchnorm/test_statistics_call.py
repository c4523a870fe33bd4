"""Packing, summing and reading the messages of simulated clients, against exact fractions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from fedtan_hpc.batchnorm.messages import (
    HEADER,
    ClientWeights,
    Derivatives,
    check_weights,
    merge,
    pack,
)
from fedtan_hpc.batchnorm.statistics_call import GlobalStatistics
from fedtan_hpc.distributed.different_calls import check_tag, have_tag
from fedtan_hpc.distributed.lockstep import Lockstep

Exact: TypeAlias = tuple[Fraction, Fraction]
"""Mean and variance of one channel."""
Moments: TypeAlias = tuple[Tensor, Tensor]
"""Global mean and biased variance, (C,) each."""

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


def packed(tag: float, weights: ClientWeights, values_KD: Tensor) -> Tensor:
    return pack(torch.tensor([tag, tag * tag], dtype=torch.float64), weights, [values_KD])


def combine(p: list[float], xs: list[Tensor], is_stacked: bool = False) -> Moments:
    """The global moments, from the sum of the clients' messages or from that of their stack."""
    if is_stacked:
        call = GlobalStatistics(p, None, ["bn"]).call(0, None)
        means, variances = zip(*map(moments, xs), strict=True)
        return call.share_moments([len(x) for x in xs], torch.stack(means), torch.stack(variances))

    def share(p_k: float, x: Tensor) -> Moments:
        call = GlobalStatistics([p_k], None, ["bn"], lockstep).call(0, None)
        mean_C, variance_C = moments(x)
        return call.share_moments([len(x)], mean_C.unsqueeze(0), variance_C.unsqueeze(0))

    lockstep = Lockstep([partial(share, *each) for each in zip(p, xs, strict=True)], merge)
    first, *others = lockstep.run()
    for other in others:
        assert all(map(torch.equal, other, first))
    return first


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


def errors(
    name: str, offset: float, truth: Callable[..., list[Exact]], is_stacked: bool
) -> tuple[float, float]:
    """Worst relative errors of mean and variance."""
    p = WEIGHTS[name]
    xs = batches(len(p), offset)
    (mean_C, variance_C), exact = combine(p, xs, is_stacked), truth(p, xs)
    mean_error = worst_error(mean_C, [mean for mean, _ in exact])
    return mean_error, worst_error(variance_C, [variance for _, variance in exact])


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("offset", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_sum_of_messages_holds_the_moments_far_from_zero(
    name: str, offset: float, is_stacked: bool
) -> None:
    mean_error, variance_error = errors(name, offset, exact_from_moments, is_stacked)
    assert mean_error < 1e-15
    assert variance_error < 1e-15


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize(("offset", "bound"), [(1.0, 2e-15), (1e3, 1e-12), (1e6, 1e-9)])
@pytest.mark.parametrize("name", WEIGHTS)
def test_moments_of_the_values_themselves_survive_the_messages(
    name: str, offset: float, bound: float, is_stacked: bool
) -> None:
    mean_error, variance_error = errors(name, offset, exact_from_values, is_stacked)
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
    xs = [torch.full((n, CHANNELS), 1e6 + 0.1, dtype=torch.float64) for n in (4, 9)]
    _, variance_C = combine([0.25, 0.75], xs)
    assert torch.all(variance_C >= 0)
    assert torch.all(variance_C < 1e-9)


@pytest.mark.parametrize("offset", [1.0, 1e2, 1e4, 1e6])
def test_float32_moments_lose_less_than_values_of_24_bits_have_lost(offset: float) -> None:
    """Rounding values adds a twelfth of their spacing, squared, to their variance."""
    p, xs = [0.4, 0.6], [x.float() for x in batches(2, offset)]
    context, exact = GlobalStatistics(p, None, ["bn"]), exact_from_moments(p, xs)
    means, variances = (torch.stack(each) for each in zip(*map(moments, xs), strict=True))
    weights = context.client_weights([len(x) for x in xs])
    share = context.call(0, None)._share_in_one_exchange
    mean_C, variance_C = share(weights, means, variances)[1].chunk(2)
    assert worst_error(mean_C, [mean for mean, _ in exact]) < 1e-15
    for value, (mean, variance) in zip(variance_C.tolist(), exact, strict=True):
        spacing = 2.0**-23 * 2.0 ** math.floor(math.log2(abs(mean) + variance))
        assert abs(value - float(variance)) < spacing**2 / 12 + 1e-15 * float(variance)


def summed(tags: list[int], p: list[float], values: list[Tensor]) -> Tensor:
    """The sum of the messages of ranks that have a client of four samples each."""
    rows = zip(tags, p, values, strict=True)
    return merge_ranks([packed(tag, ClientWeights([w], [4]), v.unsqueeze(0)) for tag, w, v in rows])


def merge_ranks(sent: list[Tensor]) -> Tensor:
    return torch.stack(sent).sum(0)


def test_the_count_leaves_out_clients_without_weight() -> None:
    ones = torch.ones(1, 2)
    sent = [packed(4, ClientWeights([w], [n]), ones) for w, n in ((0.4, 5), (0.0, 8), (0.6, 3))]
    assert merge_ranks(sent)[:HEADER].tolist() == [12, 48, 5 + 3, 1.0]
    assert packed(4, ClientWeights([0.4, 0.0, 0.6], [5, 8, 3]), torch.ones(3, 2))[2] == 5 + 3


@pytest.mark.parametrize(
    "share",
    [ClientWeights([0.0], [4]), ClientWeights([-1.0], [4]), ClientWeights([float("nan")], [4])],
)
def test_a_client_that_takes_no_part_sends_zeros_whatever_it_holds(share: ClientWeights) -> None:
    broken = torch.full((1, CHANNELS), torch.nan, dtype=torch.float64)
    assert packed(4, share, broken)[HEADER:].count_nonzero() == 0


def test_derivatives_are_added_with_their_weights() -> None:
    p = [0.2, 0.5, 0.3]
    sums = torch.randn(3, 2 * CHANNELS, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.tensor(p, dtype=torch.float64) @ sums
    stacked = packed(5, ClientWeights(p, [4] * 3), sums)[HEADER:]
    torch.testing.assert_close(stacked, expected, rtol=1e-14, atol=1e-15)
    found = summed([5] * 3, p, list(sums))[HEADER:]
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_message_sizes(channels: int, dtype: torch.dtype) -> None:
    """4 + 2C there and back; float64 moments go in two messages of 4 + C."""
    sent: list[tuple[int, torch.dtype]] = []

    class Recording(GlobalStatistics):
        def sum(self, message: Tensor, place: str) -> Tensor:
            sent.append((message.numel(), message.dtype))
            return message

    ones = torch.ones(1, channels, dtype=dtype)
    call = Recording([1.0], None, ["bn"]).call(0, None)
    call.share_moments([4], ones, ones)
    call.share_derivatives([4], Derivatives(ones, ones, ones))
    forward = [4 + channels] * 2 if dtype is torch.float64 else [4 + 2 * channels]
    assert sent == [(size, torch.float64) for size in (*forward, 4 + 2 * channels)]


def ranks_that_notice(tags: list[int], clients: int) -> int:
    """How many ranks' checks raise when rank k sends ``tags[k]``, with so many clients each."""
    weights = ClientWeights([1 / len(tags) / clients], [4])
    ones = torch.ones(1, 2)
    sent = [merge([packed(tag, weights, ones)] * clients) for tag in tags]
    noticed = 0
    for tag in tags:
        noticed += not have_tag(merge_ranks(sent)[:HEADER].tolist(), tag, len(tags))
    return noticed


TAG_SETS = {
    "small": [2, 3, 4, 5, 7],
    "large": [2, 1_000_003, 2**24, 2**24 + 1, 2**25 - 1],
}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("tags", TAG_SETS)
@pytest.mark.parametrize("clients", [1, 3])
def test_every_rank_notices_any_mix_of_tags(tags: str, ranks: int, clients: int) -> None:
    for mix in itertools.combinations_with_replacement(TAG_SETS[tags], ranks):
        expected = ranks if len(set(mix)) > 1 else 0
        assert ranks_that_notice(list(mix), clients) == expected, mix


@pytest.mark.parametrize("mix", list(itertools.product([2, 3, 5], repeat=3)), ids=str)
def test_clients_of_a_rank_at_different_layers_are_noticed(mix: tuple[int, ...]) -> None:
    weights, ones = ClientWeights([1 / 3], [4]), torch.ones(1, 2)
    total = merge([packed(tag, weights, ones) for tag in mix])
    for tag in mix:
        if len(set(mix)) == 1:
            check_tag(total[:HEADER].tolist(), tag, "", None)
        else:
            with pytest.raises(RuntimeError, match="clients of one rank are at different layers"):
                check_tag(total[:HEADER].tolist(), tag, "", None)


def checked(p: list[float], counts: list[int]) -> None:
    """Check the message of clients with these weights and batch sizes."""
    ones = torch.ones(1, 2)
    sent = [packed(2, ClientWeights([w], [n]), ones) for w, n in zip(p, counts, strict=True)]
    check_weights(merge_ranks(sent)[:HEADER].tolist(), len(p))


@pytest.mark.parametrize("excess", [0.0, 5e-7, -5e-7])
def test_weights_may_miss_1_by_rounding(excess: float) -> None:
    checked([0.5, 0.5 + excess], [2, 2])


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ([0.5, 0.5 + 2e-6], "sum to 1.000002 over 2 ranks"),
        ([0.5, 0.5 - 2e-6], "sum to 0.999998 over 2 ranks"),
        ([0.0, 0.0], "sum to 0 over 2 ranks"),
        ([-0.5, 1.5], "a weight on 2 ranks is negative"),
        ([float("nan"), float("inf")], "a weight on 2 ranks is negative"),
        ([1e300, 1e300], "sum to"),
    ],
)
def test_weights_that_are_not_shares_of_1_are_refused(p: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(p, [2, 2])


def test_an_empty_batch_that_counts_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch is empty"):
        checked([0.5, 0.5], [2, 0])


def test_one_value_in_all_has_no_variance() -> None:
    with pytest.raises(ValueError, match="a variance needs two"):
        checked([1.0, 0.0], [1, 5])
