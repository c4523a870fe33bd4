"""The benchmarks time all variants of the command line, and print what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import benchmark, convolutions, processes, rounds
from fedtan_hpc.reporting import options
from tests.helpers import commands
from tests.helpers.ranks import on_ranks

TINY = ("model=mlp", "data.shape=[1,4,4]", "local_steps=2", "batch_size=4", "repeats=1")


def test_a_round_of_every_variant_is_timed(tmp_path: Path) -> None:
    tool = commands.tool("bench_round.py")
    words = ("--nproc-per-node", "2", tool, *TINY, "shared=[2]")
    done = commands.forked("torchrun", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names, shared = ["plain", "local", "fedavg", "fedtan", "alone"], "2 ranks a client"
    names += [f"{name}, {shared}" for name in ("fedavg", "fedtan", "overlapped")]
    assert [row["variant"] for row in found["results"]] == names
    for row in found["results"]:
        assert row["round_ms"] > 0
        assert len(row["all_ms"]) == 1
        assert row["backend"] == "gloo"
    assert (found["setting"]["ranks"], found["setting"]["model"]) == (2, "mlp")
    assert "| fedtan | gloo | false |" in done.stderr


@pytest.mark.slow
def test_the_files_of_all_ranks_count_for_a_checkpoint(tmp_path: Path) -> None:
    """The clients' whole models, which lie on the disk in files of each rank."""
    words = ("clients=8", "local_steps=1", "repeats=1", "algorithm=singleset")
    tool = commands.tool("bench_checkpoint.py")
    sizes = []
    for start in (["python"], ["torchrun", "--nproc-per-node", "2"]):
        done = commands.forked(*start, tool, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        sizes.append(json.loads(done.stdout.splitlines()[-1])["bytes"])
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


@pytest.mark.slow
def test_the_peak_of_every_variant_is_printed(tmp_path: Path) -> None:
    tool = commands.tool("bench_memory.py")
    words = ("model=cnn", "data.shape=[3,16,16]", "local_steps=1", "batch_size=64", "repeats=1")
    done = commands.forked("python", tool, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    names = [row["variant"] for row in results]
    assert names == ["plain-eager", "local-eager", "fedavg-eager", "fedtan-eager"]
    assert all(row["peak_MB"] > 0 and row["to_plain"] > 0 for row in results)


def test_the_convolutions_of_every_step_are_a_lower_bound() -> None:
    """One operation for each layer and step, on tensors of the network's shapes."""
    words = ("model=resnet20", "data.shape=[3,8,8]", "batch_size=4", "local_steps=2")
    config = options.composed([*benchmark.DEFAULTS, *words])
    run = convolutions.round_of(config, torch.device("cpu"))
    assert run is not None
    with torch.profiler.profile(record_shapes=True) as profile:
        run()
    calls = [event for event in profile.events() if event.name == "aten::convolution"]
    back = [event for event in profile.events() if event.name == "aten::convolution_backward"]
    assert len(calls) == len(back) == 2 * 19
    assert calls[0].input_shapes[:2] == [[4, 3, 8, 8], [16, 3, 3, 3]]
    assert calls[18].input_shapes[:2] == [[4, 64, 2, 2], [64, 64, 3, 3]]
    no_images = options.composed([*benchmark.DEFAULTS, "model=mlp"])
    assert convolutions.round_of(no_images, torch.device("cpu")) is None


def trained_in_parallel() -> tuple[list[float], list[float]]:
    """Sums of the parameters before and after rounds, with a new process group for each.

    SyncBatchNorm needs a GPU; here BN uses local statistics.
    """
    config = options.composed([*benchmark.DEFAULTS, *TINY[:-1]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", lambda model: model)
        parallel = rounds.DataParallelRound(config, torch.device("cpu"))
    first = [float(value.sum()) for value in parallel.model.parameters()]
    for _ in range(2):
        parallel.begin()
        parallel()
    return first, [float(value.sum()) for value in parallel.model.parameters()]


def test_torchs_data_parallelism_is_a_variant() -> None:
    """Ranks end with the same parameters, though their samples differ."""
    (first, one), (_, other) = on_ranks(2, trained_in_parallel)
    assert one == other
    assert one != first


def test_sums_of_every_size_are_timed(tmp_path: Path) -> None:
    tool = commands.tool("bench_allreduce.py")
    words = ("torchrun", "--nproc-per-node", "2", tool, "values=[1,64]", "repeats=2")
    done = commands.forked(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [row["bytes"] for row in results] == [8, 512]
    for row in results:
        assert row["latency_us"] > 0
        assert len(row["all_us"]) == 2


@pytest.mark.slow
def test_streamed_images_are_timed_beside_torchs_loader(tmp_path: Path) -> None:
    words = ("images=40", "batch_size=4", "local_steps=2", "repeats=1", "data.image_size=16")
    tool = commands.tool("bench_loading.py")
    done = commands.forked("python", tool, *words, "workers=[1,2]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ways = [(row["way"], row["workers"]) for row in found["results"]]
    assert ways == [("plain", 1), ("streamed", 1), ("plain", 2), ("streamed", 2)]
    for row in found["results"]:
        assert row["images_per_second"] > 0
        assert row["together_MB"] > row["workers_MB"] > 1
        assert row["rank_MB"] > 50
    assert found["setting"]["image_size"] == 16
    assert "| streamed | 2 |" in done.stderr


def test_the_memory_of_workers_is_read_while_they_live() -> None:
    peaks, sleep = processes.MemoryPeaks(), "import time; time.sleep(60)"
    peaks.start()
    worker = subprocess.Popen([sys.executable, "-c", f"a = b'1' * 50_000_000; {sleep}"])
    while peaks.workers < 50e6:
        time.sleep(0.05)
    short = processes.MemoryPeaks()
    short.start()
    short.finish()
    assert short.everything > short.workers > 50e6
    worker.kill()
    worker.wait()
    peaks.finish()
    assert peaks.everything > peaks.workers
    assert worker.pid not in processes.children()


@pytest.mark.parametrize(
    ("tool", "word"),
    [
        ("bench_loading.py", "workers=[0]"),
        ("bench_loading.py", "images=none"),
        ("bench_round.py", "backends=[tcp]"),
        ("bench_round.py", "repeats=0"),
        ("bench_round.py", "rounds=0"),
        ("bench_allreduce.py", "values=[0]"),
        ("bench_allreduce.py", "repeats=many"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tool: str, word: str, tmp_path: Path) -> None:
    done = commands.forked("python", commands.tool(tool), word, cwd=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert word.partition("=")[0] in line
