"""Predictions of rounds, their messages against a job's, and the tools that fit and validate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedtan_hpc
import predict_scaling
import validate_prediction
from bench import waits
from fedtan_hpc.config.enums import AlgorithmName, PrecisionName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import AlgorithmConfig, Config
from scaling import job_costs, network_model
from scaling.round_model import Method
from tests.helpers import commands

SMALL = ("data=digits", "model=mlp", "local_steps=2", "batch_size=4", "compute_seconds=0.01")


def predicted(folder: Path, *words: str) -> list[dict[str, Any]]:
    """The rows of a prediction for a small network."""
    request = predict_scaling.parse([*SMALL, f"out={folder}", *words])
    return predict_scaling.predict(request)[1]


@pytest.mark.slow
def test_two_ranks_fit_a_network_and_a_prediction_reads_it(tmp_path: Path) -> None:
    words = ("torchrun", "--nproc-per-node", "2", commands.tool("fit_network.py"))
    done = commands.forked(*words, "out=n.json", "repeats=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gloo: alpha" in done.stdout
    content = json.loads((tmp_path / "n.json").read_text())
    assert content["setting"]["ranks"] == 2
    assert len(content["timings"]) == 8
    [network] = network_model.read(tmp_path / "n.json")
    assert (network.name, network.algorithms, network.ranks_measured) == ("gloo", ("exchange",), 2)
    assert len(network.waits) == len(waits.COMPUTE_SECONDS)
    assert all(computed > 0 and wait >= 0 for computed, wait in network.waits)
    [row] = predicted(tmp_path, f"network={tmp_path}/n.json", "ranks=64")[::4]
    assert row["network"].startswith("gloo (")
    assert row["statistics_seconds"] > 4 * network.alpha_s


@pytest.mark.slow
def test_a_prediction_is_compared_with_rounds(tmp_path: Path) -> None:
    """A busy machine says nothing on the size of the error, which the test leaves out."""
    words = ("torchrun", "--nproc-per-node", "2", commands.tool("validate_prediction.py"))
    job = ("models=[mlp]", "repeats=1", "local_steps=2", "data.shape=[1,8,8]")
    done = commands.forked(*words, *job, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["setting"]["ranks"] == 2
    assert [row["method"] for row in found["results"]] == ["fedtan", "fedavg", "centralised"]
    for row in found["results"]:
        assert row["predicted_ms"] == pytest.approx(sum(row["terms_ms"].values()))
        assert row["error"] == pytest.approx(row["predicted_ms"] / row["measured_ms"] - 1)
        assert row["terms_ms"]["average"] > 0


def test_a_validation_names_networks_by_models() -> None:
    for word in ("model=cnn", "clients=3", "algorithm=fedbn", "algorithm.synchronised_steps=3"):
        with pytest.raises(ConfigError, match=rf"{word}: .*leave it out; models=\[...\] names"):
            validate_prediction.configs_of("models=[mlp]", [word])


def methods_of(config: Config, clients: int) -> dict[str, Method]:
    methods = job_costs.methods(config, *job_costs.build(config), clients)
    return {method.name: method for method in methods}


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", ["fedtan", "fedavg", "centralised"])
def test_messages_are_those_that_a_job_counts(name: str, precision: str, tmp_path: Path) -> None:
    config = Config(clients=2, rounds=1, local_steps=3, run_dir=str(tmp_path))
    config.precision = PrecisionName(precision)
    config.algorithm = AlgorithmConfig(name=AlgorithmName(name))
    fedtan_hpc.run(config, callbacks=[])
    counted = json.loads((tmp_path / "rounds.jsonl").read_text())
    methods = methods_of(config, 2)
    *average, _losses = methods[name].average
    statistics = [*methods[name].statistics] * int(methods[name].steps(3))
    messages = [*average, *statistics, *[*methods[name].gradients] * 3]
    assert len(messages) == counted["payload_messages"]
    assert sum(messages) == counted["payload_bytes"]


def test_the_paper_sends_three_messages_a_layer() -> None:
    config = predict_scaling.parse([*SMALL, "model=resnet20", "data=synthetic"]).config
    methods = methods_of(config, 8)
    assert len(methods["three_messages"].statistics) == 57
    assert sum(methods["three_messages"].statistics) == 4 * 2752
    assert len(methods["fedtan"].statistics) == 38


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        (["algorithm.layers=auto", "algorithm.fraction=0.25"], 5),
        (["algorithm.layers=auto", "algorithm.fraction=0"], 0),
        (["algorithm.layers=[bn,blocks.0.*]"], 3),
        (["algorithm.synchronise_every=auto"], 19),
    ],
)
def test_only_synchronised_layers_send(words: list[str], layers: int) -> None:
    """centralised synchronises all of them in any case."""
    config = predict_scaling.parse([*SMALL, "model=resnet20", "data=synthetic", *words]).config
    methods = methods_of(config, 8)
    assert len(methods["fedtan"].statistics) == 2 * layers
    assert len(methods["centralised"].statistics) == 38
    assert methods["fedtan"].synchronise_every == 1


def test_clients_on_several_ranks(tmp_path: Path) -> None:
    """A rank takes its part of a step, and sums of a client stay inside a node."""
    words = ("network=nvlink_ndr", "ranks=[64]")
    alone = {row["method"]: row for row in predicted(tmp_path, *words)}
    shared = {row["method"]: row for row in predicted(tmp_path, *words, "ranks_per_client=4")}
    for name, row in shared.items():
        assert row["clients_of_a_rank"] == 1
        assert row["compute_seconds"] == pytest.approx(alone[name]["compute_seconds"] / 4)
        assert alone[name]["client_seconds"] == 0.0
    assert shared["centralised"]["client_seconds"] == 0.0
    assert 0 < shared["fedtan"]["client_seconds"] < shared["fedavg"]["client_seconds"]
    with pytest.raises(ConfigError, match=r"ranks=6: allowed is multiples of ranks_per_client, 4"):
        predicted(tmp_path, "ranks=[6]", "ranks_per_client=4")


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
    predict_scaling.run(words)
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
    with pytest.raises(ConfigError) as caught:
        predict_scaling.parse(MISTAKES[option])
    [line] = caught.value.mistakes
    assert line.startswith(f"{option}=")
    assert ": allowed is " in line


@pytest.mark.parametrize(
    ("tool", "word"),
    [("predict_scaling.py", "ranks=few"), ("fit_network.py", "backends=[tcp]")],
)
def test_a_mistake_is_one_line_and_exit_code_2(tool: str, word: str, tmp_path: Path) -> None:
    done = commands.forked("python", commands.tool(tool), word, cwd=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert word.partition("=")[0] in line
