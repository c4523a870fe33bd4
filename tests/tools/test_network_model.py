"""The models of a network and of a round against sums done by hand, and fits of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import predict_scaling
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.distributed.counters import MAX_EXCHANGE_BYTES
from scaling import network_fit, network_model
from scaling.network_model import PRESETS, Network
from scaling.round_model import Load, Method, remedies, terms

SIMPLE = Network(name="simple", alpha_s=1.0, beta_s_per_byte=0.5)
WAITING = replace(
    SIMPLE, waits=((1.0, 2.0), (3.0, 6.0)), ranks_measured=4, median_error=0.1, worst_error=0.2
)


@pytest.mark.parametrize(
    ("size", "ranks", "seconds"),
    [
        (100, 1, 0.0),
        (2, 2, 1 + 1),  # doubling: one step of 1 s and 2 bytes
        (2, 8, 3 + 3),  # doubling: three steps
        (2, 5, 3 + 3),  # as many steps as with 8 ranks
        (1000, 4, 6 + 2 * 0.75 * 500),  # ring: six steps; doubling would take 2 + 1000
    ],
)
def test_a_sum_takes_the_time_of_its_steps_and_bytes(size: int, ranks: int, seconds: float) -> None:
    assert SIMPLE.all_reduce_seconds(size, ranks) == pytest.approx(seconds)


def test_steps_inside_a_node_have_their_own_alpha() -> None:
    tree = replace(SIMPLE, algorithms=("tree",), base_s=0.25, ranks_a_node=4, node_alpha_s=0.125)
    assert tree.all_reduce_seconds(2, 4) == 0.25 + 2 * 2 * 0.125 + 2
    assert tree.all_reduce_seconds(2, 16) == 0.25 + 2 * 2 * 1 + 2 * 2 * 0.125 + 2
    ring = replace(tree, algorithms=("ring",))
    assert ring.all_reduce_seconds(16, 8) == 0.25 + 2 * 1 + 12 * 0.125 + 2 * 7 / 8 * 8
    assert ring.all_reduce_seconds(16, 4) == 0.25 + 6 * 0.125 + 2 * 3 / 4 * 8


def test_small_messages_take_one_exchange_and_large_ones_the_ring() -> None:
    exchange = replace(SIMPLE, algorithms=("exchange",))
    largest = MAX_EXCHANGE_BYTES
    assert exchange.all_reduce_seconds(16, 8) == 1 + 7 * 8
    assert exchange.all_reduce_seconds(largest, 2) == 1 + largest / 2
    assert exchange.all_reduce_seconds(largest + 8, 2) == 2 + (largest + 8) / 2
    node = replace(exchange, ranks_a_node=8, node_alpha_s=0.125)
    assert node.all_reduce_seconds(16, 8) == 0.125 + 7 * 8


def test_presets_name_their_assumptions() -> None:
    assert set(PRESETS) == {"nvlink_ndr", "ethernet25", "wan50ms"}
    assert all("ssumed" in network.source for network in PRESETS.values())
    assert PRESETS["nvlink_ndr"].all_reduce_seconds(512, 8) == pytest.approx(16.4e-6, rel=0.01)


def test_a_round_is_the_sum_of_its_terms() -> None:
    """Two ranks: a message of n bytes takes 1 + n / 2 seconds."""
    load = Load(step_seconds=10, local_steps=3, batch_size=4, clients=2)
    method = Method("m", average=(8, 2), statistics=(2, 4), gradients=(6,), synchronise_every=2)
    found = terms(method, load, SIMPLE, 2)
    assert (found.compute, found.statistics, found.gradients) == (60, 0.5 * (2 + 3), 3 * 4)
    assert found.average == 5 + 2
    assert found.efficiency == pytest.approx(60 / (60 + 2.5 + 12 + 7))
    assert found.largest == "compute"
    pooled = terms(replace(method, synchronised_steps=None), load, SIMPLE, 2)
    assert pooled.statistics == 3 * (2 + 3)


@pytest.mark.parametrize(
    ("computed", "ranks", "seconds"),
    [(0.5, 4, 2), (2, 4, 4), (10, 4, 6), (2, 1, 0), (2, 2, 4 * 0.54), (2, 64, 4 * 2.28)],
)
def test_a_sum_waits_as_measured(computed: float, ranks: int, seconds: float) -> None:
    """The largest of 2, 4 and 64 normal deviates is 0.56, 1.03 and 2.34 (order statistics)."""
    assert WAITING.wait_seconds(computed, ranks) == pytest.approx(seconds, rel=0.06)
    assert SIMPLE.wait_seconds(computed, ranks) == 0


def test_messages_wait_according_to_the_computing_before_them() -> None:
    load = Load(1.5, local_steps=3, batch_size=4, clients=1, synchronised_step_seconds=4)
    fedtan = Method("m", average=(8, 2), statistics=(2, 4))
    found = terms(fedtan, load, WAITING, 4)
    assert found.compute == 2 * 1.5 + 4
    assert found.waiting == pytest.approx(2 * 4 + 6)  # two after 2 s each, one after 3 s
    assert found.seconds == pytest.approx(found.compute + found.statistics + found.average + 14)
    fedavg = replace(fedtan, statistics=())
    assert terms(fedavg, load, WAITING, 4).waiting == pytest.approx(6)
    pooled = replace(fedtan, gradients=(4,), synchronised_steps=None)
    assert terms(pooled, load, WAITING, 4).waiting == pytest.approx(3 * 3 * (2 + 2 * (4 / 3 - 1)))


METHODS = [
    Method("fedtan", (400, 8), statistics=(50, 30) * 3),
    Method("fedtan", (40, 8), statistics=(500, 30) * 3, synchronised_steps=2, synchronise_every=3),
    Method("fedavg", (400, 8)),
    Method("centralised", (400, 8), (50, 30), (400,), synchronised_steps=None),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [1.0, 30.0, 4000.0, 1e6])
def test_a_remedy_reaches_its_target_and_one_less_does_not(method: Method, step: float) -> None:
    load = Load(step, local_steps=2, batch_size=8, clients=1)

    def efficiency(option: str, value: int) -> float:
        if option == "synchronise_every":
            return terms(replace(method, synchronise_every=value), load, SIMPLE, 8).efficiency
        changed = replace(load, **{option: value})
        if option == "batch_size":
            changed = replace(changed, step_seconds=step * value / load.batch_size)
        return terms(method, changed, SIMPLE, 8).efficiency

    for option, value in remedies(method, load, SIMPLE, 8, 0.9).items():
        if value == "already":
            assert terms(method, load, SIMPLE, 8).efficiency >= 0.9
        elif value == "none":
            assert option == "synchronise_every" or method.name == "centralised"
            if option == "local_steps" or (method.statistics and method.synchronised_steps):
                assert efficiency(option, 10**9) < 0.9
        else:
            assert efficiency(option, int(value)) >= 0.9 - 1e-9
            assert efficiency(option, int(value) - 1) < 0.9


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("backend", ["mpi", "gloo", "nccl"])
def test_a_fit_finds_the_network_that_made_the_times(backend: str, ranks: int) -> None:
    algorithms = network_fit.algorithms_of(backend)
    true = Network(name=backend, alpha_s=2e-5, beta_s_per_byte=2e-10, algorithms=algorithms)
    sizes = [8 * 4**power for power in range(3, 11)]
    noise = np.random.default_rng(0).uniform(0.97, 1.03, len(sizes))
    seconds = [true.all_reduce_seconds(n, ranks) * f for n, f in zip(sizes, noise, strict=True)]
    found = network_fit.fit(backend, sizes, seconds, ranks)
    assert found.alpha_s == pytest.approx(true.alpha_s, rel=0.05)
    assert found.beta_s_per_byte == pytest.approx(true.beta_s_per_byte, rel=0.05)
    assert found.ranks_measured == ranks
    assert found.median_error is not None
    assert found.worst_error is not None
    assert found.median_error <= found.worst_error < 0.05


def test_a_latency_is_never_below_0() -> None:
    found = network_fit.fit("gloo", [1000, 2000], [1.0, 3.0], 2)
    assert found.alpha_s == 0
    assert found.beta_s_per_byte > 0


def test_one_rank_has_nothing_to_fit(tmp_path: Path) -> None:
    timings = [{"backend": "gloo", "bytes": 8, "latency_us": 1.0}]
    assert network_fit.fit_all(timings, 1, "machine") == []
    network_model.write(tmp_path / "none.json", [])
    with pytest.raises(ConfigError, match=r"none\.json.*fit on two ranks"):
        predict_scaling.parse([f"network={tmp_path}/none.json"])


def test_networks_survive_writing_and_reading(tmp_path: Path) -> None:
    networks: Sequence[Network] = [*PRESETS.values(), WAITING]
    network_model.write(tmp_path / "n.json", networks, setting={"ranks": 2})
    assert network_model.read(tmp_path / "n.json") == networks


COMPLETE = '"name": "n", "alpha_s": 1, "beta_s_per_byte": 0, "algorithms": ["ring"]'
NETWORKS = [
    ('"name": "n", "algorithms": ["ring"]', "incomplete"),
    ('"colour": 1', "entries"),
    (COMPLETE.replace(": 1", ": -1"), ">= 0"),
    (COMPLETE.replace("ring", "star"), "doubling"),
    (f'{COMPLETE}, "ranks_measured": 1', "ranks_measured"),
    (f'{COMPLETE}, "ranks_measured": "two"', "ranks_measured"),
    (f'{COMPLETE}, "ranks_measured": 2', "median_error"),
    (f'{COMPLETE}, "median_error": 0.1, "worst_error": 0.2', "ranks_measured"),
    (
        f'{COMPLETE}, "ranks_measured": 2, "median_error": 0.1, "worst_error": -1',
        "worst_error",
    ),
]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{}", "no list"),
        ("not json", "Expecting"),
        *[(f'{{"networks": [{{{entries}}}]}}', reason) for entries, reason in NETWORKS],
    ],
)
def test_a_file_that_is_no_network_is_a_mistake(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "n.json").write_text(content)
    with pytest.raises(ConfigError, match=reason):
        predict_scaling.parse([f"network={tmp_path}/n.json"])
