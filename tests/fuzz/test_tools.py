"""Numbers of the tools' own options: each has bounds, and a mistake is told before work begins."""

from __future__ import annotations

import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

import bench_allreduce
import bench_checkpoint
import bench_cohort
import bench_loading
import bench_memory
import bench_round
import fit_network
import make_scanners
import predict_scaling
import probe
import scaling_study
import validate_prediction
from bench import benchmark
from fedtan_hpc import evaluate
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.reporting import options

OPTIONS = {
    bench_allreduce: ("values", "repeats"),
    bench_checkpoint: ("repeats",),
    bench_loading: ("workers", "images", "repeats"),
    bench_memory: ("compile", "repeats"),
    bench_round: ("compile", "shared", "repeats"),
    fit_network: ("repeats",),
    predict_scaling: ("network", "ranks", "clients_per_rank", "compute_seconds"),
    probe: ("batches",),
    scaling_study: ("world_sizes", "repeats"),
    validate_prediction: ("repeats",),
}
LISTS = ("compile", "network", "values", "workers", "shared", "ranks", "world_sizes")
SEVERAL = ("1,2", "[1,2]", "range(1,3)")
WORST = ("0", "10000000000", "x", "[[a]]", "9" * 5000, "range(1,1000000000000000000)")
WRONG = [
    *WORST,
    *("-1", "nan", "-inf", "1e308", "1.0", "true", "", "x y", "[", "[]", "a\x1b[31mb", "\n"),
    *("9" * 400, "1" * 10_000, "range(0,0)", "range(1,5,0)", "interval(0,1)", "glob(x)"),
    *("[1,[2]]", "{a:1}", "${oops}"),
]


def check_mistakes(function: Callable[[], object], name: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        function()
    for line in caught.value.mistakes:
        assert name in line
        assert line.isprintable()
        assert len(line) < 500
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("tool", "name"),
    [(tool, name) for tool, names in OPTIONS.items() for name in names],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
def test_a_wrong_number_is_told_at_once(tool: ModuleType, name: str) -> None:
    more = ["run_dir=nowhere"] if tool is probe else []
    for text in (*WORST, *([] if name in LISTS else SEVERAL[:1])):
        check_mistakes(partial(tool.run, [f"{name}={text}", *more]), name)


@pytest.mark.parametrize("text", [*WRONG, *SEVERAL])
def test_a_number_of_a_tool_has_bounds(text: str) -> None:
    check_mistakes(partial(benchmark.whole_number, f"repeats={text}", "3"), "repeats")
    with pytest.raises(ArgumentTypeError, match="allowed is a whole number >= 1"):
        benchmark.count(text)


@pytest.mark.parametrize("tool", [each for each in OPTIONS if each is not probe])
def test_a_wrong_number_of_the_job_is_told_too(tool: ModuleType) -> None:
    check_mistakes(partial(tool.run, ["rounds=" + "9" * 5000]), "rounds")


@pytest.mark.parametrize("text", ["-1", "x", "1.0", "9" * 11, "9" * 5000])
def test_a_wrong_client_of_an_evaluation_is_told(text: str) -> None:
    check_mistakes(partial(evaluate.evaluated, {"run_dir": "x", "client": text}, []), "client")


@pytest.mark.parametrize("word", ["--clients", "--batch-size", "--local-steps", "--repeats"])
def test_counts_of_stacked_clients_have_bounds(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("0", "1000001", "9" * 5000):
        monkeypatch.setattr("sys.argv", ["bench_cohort.py", word, text])
        with pytest.raises(SystemExit):
            bench_cohort.parse()
        assert "allowed is a whole number >= 1, 1000000 at most" in capsys.readouterr().err


def test_repeats_have_a_bound_of_their_own() -> None:
    assert benchmark.repeats({"repeats": "repeats=1000"}, 3) == 1000
    check_mistakes(partial(benchmark.repeats, {"repeats": "repeats=1001"}, 3), "repeats")


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_of_scanners_has_bounds(
    seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make_scanners.main([str(tmp_path / "new"), "--seed", seed])
    assert f"--seed={seed}: allowed is 0 to 4294967295" in capsys.readouterr().err


def test_a_range_and_a_list_are_values() -> None:
    assert benchmark.whole_number("repeats=12", "3") == benchmark.count("12") == 12
    assert options.values("ranks=range(1,4)", "1") == [1, 2, 3]
    assert options.values("network='a b',c", "1") == ["a b", "c"]
    assert options.values("ranks=[8,64]", "1") == options.values("ranks=8,64", "1") == [8, 64]


def test_an_experiment_replaces_the_network_of_a_tool() -> None:
    def model(*words: str) -> str:
        return str(predict_scaling.parse(list(words)).config.model.name)

    assert (model(), model("experiment=digits_shards")) == ("resnet20", "mlp")
    assert model("experiment=digits_shards", "model=cnn") == "cnn"
