"""The cost model against sums done by hand, fits against what made them, messages against a job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fit_network
import numpy as np
import predict_scaling
import pytest
import validate_prediction
from bench import waits
from scaling.network_model import PRESETS, Network
from scaling.round_model import Load, Method, remedies, terms

import fedtan_hpc
from fedtan_hpc.batchnorm.layer import batchnorm_layers
from fedtan_hpc.config.enums import AlgorithmName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import AlgorithmConfig, Config
from fedtan_hpc.distributed.counters import EXCHANGED
from fedtan_hpc.evaluation.records import RoundCallback
from fedtan_hpc.job.setup import network as build
from scaling import job_costs, network_model
from tests.helpers import commands

SIMPLE = Network(name="simple", alpha_s=1.0, beta_s_per_byte=0.5)
SMALL = ("data=digits", "model=mlp", "local_steps=2", "batch_size=4", "compute_seconds=0.01")


@pytest.mark.parametrize(
    ("size", "ranks", "seconds"),
    [
        (100, 1, 0.0),
        (2, 2, 1 + 1),  # doubling: one step of 1 s and 2 bytes
        (2, 8, 3 + 3),  # three of them
        (2, 5, 3 + 3),  # as with 8 ranks
        (1000, 4, 6 + 2 * 0.75 * 500),  # ring: six steps; doubling would take 2 + 1000
    ],
)
def test_a_sum_takes_what_its_steps_and_bytes_do(size: int, ranks: int, seconds: float) -> None:
    assert SIMPLE.all_reduce_seconds(size, ranks) == pytest.approx(seconds)


def test_a_tree_goes_up_and_down_and_nodes_have_steps_of_their_own() -> None:
    tree = replace(SIMPLE, algorithms=("tree",), base_s=0.25, ranks_a_node=4, node_alpha_s=0.125)
    assert tree.all_reduce_seconds(2, 4) == 0.25 + 2 * 2 * 0.125 + 2
    assert tree.all_reduce_seconds(2, 16) == 0.25 + 2 * 2 * 1 + 2 * 2 * 0.125 + 2
    ring = replace(tree, algorithms=("ring",))
    assert ring.all_reduce_seconds(16, 8) == 0.25 + 2 * 1 + 12 * 0.125 + 2 * 7 / 8 * 8
    assert ring.all_reduce_seconds(16, 4) == 0.25 + 6 * 0.125 + 2 * 3 / 4 * 8


def test_an_exchange_is_one_step_for_small_messages_and_large_ones_take_the_ring() -> None:
    exchange = replace(SIMPLE, algorithms=("exchange",))
    assert exchange.all_reduce_seconds(16, 8) == 1 + 7 * 8
    assert exchange.all_reduce_seconds(EXCHANGED, 2) == 1 + EXCHANGED / 2
    assert exchange.all_reduce_seconds(EXCHANGED + 8, 2) == 2 + (EXCHANGED + 8) / 2
    node = replace(exchange, ranks_a_node=8, node_alpha_s=0.125)
    assert node.all_reduce_seconds(16, 8) == 0.125 + 7 * 8


def test_presets_say_what_is_assumed() -> None:
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


WAITING = replace(
    SIMPLE, waits=((1.0, 2.0), (3.0, 6.0)), ranks_measured=4, median_error=0.1, worst_error=0.2
)


@pytest.mark.parametrize(
    ("computed", "ranks", "seconds"),
    [(0.5, 4, 2), (2, 4, 4), (10, 4, 6), (2, 1, 0), (2, 2, 4 * 0.54), (2, 64, 4 * 2.28)],
)
def test_a_sum_waits_as_was_measured(computed: float, ranks: int, seconds: float) -> None:
    """Of 2, 4 and 64 normal deviates the largest is 0.56, 1.03 and 2.34 (order statistics)."""
    assert WAITING.wait_seconds(computed, ranks) == pytest.approx(seconds, rel=0.06)
    assert SIMPLE.wait_seconds(computed, ranks) == 0


def test_messages_of_a_round_wait_for_what_was_computed_before_them() -> None:
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
def test_a_fit_finds_what_made_the_times(backend: str, ranks: int) -> None:
    ways = fit_network.WAYS.get(backend, ("doubling", "ring"))
    true = Network(name=backend, alpha_s=2e-5, beta_s_per_byte=2e-10, algorithms=ways)
    sizes = [8 * 4**power for power in range(3, 11)]
    noise = np.random.default_rng(0).uniform(0.97, 1.03, len(sizes))
    seconds = [true.all_reduce_seconds(n, ranks) * f for n, f in zip(sizes, noise, strict=True)]
    found = fit_network.fit(backend, sizes, seconds, ranks)
    assert found.alpha_s == pytest.approx(true.alpha_s, rel=0.05)
    assert found.beta_s_per_byte == pytest.approx(true.beta_s_per_byte, rel=0.05)
    assert found.ranks_measured == ranks
    assert found.median_error is not None
    assert found.worst_error is not None
    assert found.median_error <= found.worst_error < 0.05


def test_a_latency_is_never_below_0() -> None:
    found = fit_network.fit("gloo", [1000, 2000], [1.0, 3.0], 2)
    assert found.alpha_s == 0
    assert found.beta_s_per_byte > 0


def test_two_ranks_fit_and_a_prediction_reads_it(tmp_path: Path) -> None:
    tool = str(commands.ROOT / "tools" / "fit_network.py")
    words = ("torchrun", "--nproc-per-node", "2", tool, "out=n.json", "repeats=1")
    done = commands.forked(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gloo: alpha" in done.stdout
    content = json.loads((tmp_path / "n.json").read_text())
    assert content["setting"]["ranks"] == 2
    assert len(content["timings"]) == 8
    [network] = network_model.read(tmp_path / "n.json")
    assert (network.name, network.algorithms, network.ranks_measured) == ("gloo", ("exchange",), 2)
    assert len(network.waits) == len(waits.COMPUTED)
    assert all(computed > 0 and wait >= 0 for computed, wait in network.waits)
    [row] = predicted(tmp_path, f"network={tmp_path}/n.json", "ranks=64")[::4]
    assert row["network"].startswith("gloo (")
    assert row["statistics_seconds"] > 4 * network.alpha_s


def test_a_prediction_is_compared_with_rounds(tmp_path: Path) -> None:
    """That it is near is for the machine's quiet hours; here, that both are there."""
    tool = str(commands.ROOT / "tools" / "validate_prediction.py")
    words = ("models=[mlp]", "repeats=1", "local_steps=2", "data.shape=[1,8,8]")
    done = commands.forked("torchrun", "--nproc-per-node", "2", tool, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["setting"]["ranks"] == 2
    assert [row["method"] for row in found["results"]] == ["fedtan", "fedavg", "centralised"]
    for row in found["results"]:
        assert row["predicted_ms"] == pytest.approx(sum(row["terms_ms"].values()))
        assert row["error"] == pytest.approx(row["predicted_ms"] / row["measured_ms"] - 1)
        assert row["terms_ms"]["average"] > 0


def test_networks_are_named_by_models(tmp_path: Path) -> None:
    for word in ("model=cnn", "clients=3", "algorithm=fedbn", "algorithm.synchronised_steps=3"):
        with pytest.raises(ConfigError, match=rf"{word}: .*leave it out; models=\[...\] names"):
            validate_prediction.configs("models=[mlp]", [word])


def test_one_rank_has_nothing_to_fit(tmp_path: Path) -> None:
    assert fit_network.fits([{"backend": "gloo", "bytes": 8, "latency_us": 1.0}], 1, "m") == []
    network_model.write(tmp_path / "none.json", [])
    with pytest.raises(ConfigError, match=r"none\.json.*fit on two ranks"):
        predict_scaling.understood([f"network={tmp_path}/none.json"])


def predicted(folder: Path, *words: str) -> list[dict[str, Any]]:
    """The rows of a prediction for a small network."""
    asked = predict_scaling.understood([*SMALL, f"out={folder}", *words])
    return predict_scaling.predict(asked)[1]


@pytest.mark.parametrize("name", ["fedtan", "fedavg", "centralised"])
def test_messages_are_those_that_a_job_counts(name: str, tmp_path: Path) -> None:
    config = Config(clients=2, rounds=1, local_steps=3, run_dir=str(tmp_path))
    config.algorithm = AlgorithmConfig(name=AlgorithmName(name))
    fedtan_hpc.run(config, RoundCallback())
    counted = json.loads((tmp_path / "rounds.jsonl").read_text())
    facts = config.data.facts()
    model = build(config, facts.shape, facts.classes)
    channels = [layer.num_features for layer in batchnorm_layers(model).values()]
    [method] = [m for m in job_costs.methods(config, model, channels, 2) if m.name == name]
    *average, _losses = method.average
    of_statistics = [*method.statistics] * int(method.steps(3))
    messages = [*average, *of_statistics, *[*method.gradients] * 3]
    assert len(messages) == counted["payload_messages"]
    assert sum(messages) == counted["payload_bytes"]


def test_the_paper_sends_three_messages_a_layer(tmp_path: Path) -> None:
    asked = predict_scaling.understood([*SMALL, "model=resnet20", "data=synthetic"])
    facts = asked.config.data.facts()
    model = build(asked.config, facts.shape, facts.classes)
    channels = [layer.num_features for layer in batchnorm_layers(model).values()]
    found = {m.name: m for m in job_costs.methods(asked.config, model, channels, 8)}
    assert len(found["three_messages"].statistics) == 57
    assert sum(found["three_messages"].statistics) == 4 * 2752
    assert len(found["fedtan"].statistics) == 38


def test_options_of_the_job_count(tmp_path: Path) -> None:
    words = ("network=ethernet25", "ranks=[4,8]")
    plain = predicted(tmp_path, *words)
    rare = predicted(tmp_path, *words, "algorithm.synchronise_every=4")
    assert rare[0]["statistics_seconds"] == pytest.approx(plain[0]["statistics_seconds"] / 4)
    assert plain[0]["compute_seconds"] == pytest.approx(0.02)
    weak = predicted(tmp_path, *words, "clients_per_rank=3")
    assert [row["compute_seconds"] for row in weak] == pytest.approx([0.06] * 8)
    strong = predicted(tmp_path, *words, "clients=10")
    assert [row["clients_of_a_rank"] for row in strong[::4]] == [3, 2]


def test_a_step_is_measured_and_files_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL[:-1], "ranks=[1,64]", "network=[nvlink_ndr,wan50ms]", f"out={tmp_path}/p"]
    predict_scaling.main(words)
    content = json.loads((tmp_path / "p" / "prediction.json").read_text())
    assert content["setting"]["step_measured_here"]
    assert 0 < content["setting"]["step_seconds"] < 10
    assert len(content["predictions"]) == 2 * 2 * 4
    assert content["predictions"][0]["efficiency"] == 1
    table = (tmp_path / "p" / "prediction.md").read_text()
    assert "## wan50ms" in table
    assert table.count("| fedtan |") == 4
    assert (tmp_path / "p" / "prediction.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "wan50ms, 64 ranks" in out
    assert "largest term statistics; for 90 % local_steps" in out


MISTAKES = {
    "ranks": ["ranks=[0]"],
    "clients_per_rank": ["clients_per_rank=none"],
    "clients": ["clients=4", "clients_per_rank=2"],
    "compute_seconds": ["compute_seconds=0"],
    "network": ["network=ether"],
    "algorithm": ["algorithm=fedbn"],
    "local_steps": ["local_steps=0"],
    "out": ["out="],
}


@pytest.mark.parametrize("option", MISTAKES)
def test_a_mistake_names_option_value_and_remedy(option: str) -> None:
    with pytest.raises(ConfigError) as found:
        predict_scaling.understood(MISTAKES[option])
    [line] = found.value.mistakes
    assert line.startswith(f"{option}=")
    assert ": allowed is " in line


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{}", "no list"),
        ("not json", "Expecting"),
        ('{"networks": [{"name": "n", "algorithms": ["ring"]}]}', "not whole"),
        ('{"networks": [{"colour": 1}]}', "entries"),
        (
            '{"networks": [{"name": "n", "alpha_s": -1, "beta_s_per_byte": 0, '
            '"algorithms": ["ring"]}]}',
            ">= 0",
        ),
        (
            '{"networks": [{"name": "n", "alpha_s": 1, "beta_s_per_byte": 0, '
            '"algorithms": ["star"]}]}',
            "doubling",
        ),
        *[
            (
                '{"networks": [{"name": "n", "alpha_s": 1, "beta_s_per_byte": 0, '
                f'"algorithms": ["ring"], {measured}}}]}}',
                why,
            )
            for measured, why in (
                ('"ranks_measured": 1', "ranks_measured"),
                ('"ranks_measured": "two"', "ranks_measured"),
                ('"ranks_measured": 2', "median_error"),
                ('"median_error": 0.1, "worst_error": 0.2', "ranks_measured"),
                ('"ranks_measured": 2, "median_error": 0.1, "worst_error": -1', "worst_error"),
            )
        ],
    ],
)
def test_a_file_that_is_no_network_is_a_mistake(content: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "n.json").write_text(content)
    with pytest.raises(ConfigError, match=why):
        predict_scaling.understood([f"network={tmp_path}/n.json"])


@pytest.mark.parametrize(
    ("tool", "word"),
    [("predict_scaling.py", "ranks=few"), ("fit_network.py", "backends=[tcp]")],
)
def test_a_mistake_is_one_line_and_exit_code_2(tool: str, word: str, tmp_path: Path) -> None:
    done = commands.forked("python", str(commands.ROOT / "tools" / tool), word, cwd=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert word.partition("=")[0] in line


def test_a_fit_survives_writing_and_reading(tmp_path: Path) -> None:
    networks: Sequence[Network] = [*PRESETS.values(), WAITING]
    network_model.write(tmp_path / "n.json", networks, setting={"ranks": 2})
    assert network_model.read(tmp_path / "n.json") == networks
