"""Loading: the same models whatever the loading, the workers and the ranks; memory; failures."""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fedtan_hpc
from bench import processes
from fedtan_hpc.config.dataset_info import DatasetInfo
from fedtan_hpc.config.errors import ConfigError, RunError
from fedtan_hpc.config.schema import Config
from fedtan_hpc.data import datasets, loading
from fedtan_hpc.data.batching import Draw, Samples
from fedtan_hpc.evaluation.callbacks import RoundCallback
from fedtan_hpc.evaluation.records import RoundRecord
from fedtan_hpc.job import run_dir
from tests.data.test_own_data import composed, imported
from tests.helpers import commands
from tests.helpers.jobs import rounds_of, run_until, same_bits
from tests.helpers.own_data import HERE

SITES = ["data=import", f"data.target={HERE}:sites", "partition=natural", "precision=float64"]
SETTINGS = {
    "plain": SITES,
    "flipped": [*SITES, "data.flip=true", "data.crop_padding=2", "cohort.mode=stacked"],
    "drawn": [
        *SITES,
        "data.random_resized_crop=true",
        "data.image_size=9",
        "data.colour_jitter=0.4",
        f"data.transform={HERE}:jittered",
    ],
    "rotated": [
        "data=import",
        f"data.target={HERE}:pair",
        "data.options.kind=random",
        "partition=feature_shift",
        "precision=float64",
    ],
    "few": [*SITES, "clients_per_round=2", "rounds=4", "algorithm=fedbn"],
    "synthetic": [
        "data=synthetic",
        "data.samples=200",
        "data.shape=[3,8,8]",
        f"data.transform={HERE}:jittered",
    ],
}


def run(config: Config, folder: str) -> None:
    config.run_dir = folder
    fedtan_hpc.run(config, callbacks=[])


FAST = ("plain", "drawn")
CASES = [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in SETTINGS]


@pytest.mark.parametrize("name", CASES)
def test_models_are_equal_whatever_the_loading(name: str, tmp_path: Path) -> None:
    words = SETTINGS[name]
    ways = {"device": ["data.loading=device"]}
    ways |= {f"stream{n}": ["data.loading=stream", f"data.workers={n}"] for n in (0, 1, 2)}
    for way, more in ways.items():
        run(composed(*words, *more), str(tmp_path / way))
    for way in ways:
        assert same_bits(tmp_path / "device", tmp_path / way), way
        results = [
            [(line["train_loss"], line["test_loss"], line["test_accuracy"]) for line in rounds]
            for rounds in (rounds_of(tmp_path / "device"), rounds_of(tmp_path / way))
        ]
        assert results[0] == results[1], way


def test_batches_are_read_in_the_order_of_their_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read in the rank itself but evaluation batches, and nothing waits in memory."""
    read: list[object] = []
    waiting: list[int] = []
    original, awaited = loading.Reader.read, loading.Reader._awaited

    def counted(reader: loading.Reader, request: loading.Request) -> Samples:
        if request.draw is not None:
            read.append(request.draw)
        return original(reader, request)

    def watched(reader: loading.Reader, draw: Draw) -> object:
        result = awaited(reader, draw)
        waiting.append(len(reader._ready))
        return result

    monkeypatch.setattr(loading.Reader, "read", counted)
    monkeypatch.setattr(loading.Reader, "_awaited", watched)
    for mode in ("sequential", "stacked"):
        words = [*SITES, "data.loading=stream", "data.workers=1", f"cohort.mode={mode}"]
        run(composed(*words, "rounds=3"), str(tmp_path / mode))
    assert not read
    assert len(waiting) == 2 * 3 * 2 * 3
    assert max(waiting) == 0


def test_a_file_that_the_data_open_is_not_shared_by_workers(tmp_path: Path) -> None:
    words = ["data=import", f"data.target={HERE}:in_file", f"data.options.folder={tmp_path}"]
    words += ["model=mlp", "partition=iid", "batch_size=32", "local_steps=6", "rounds=4"]
    for workers in (0, 3):
        more = ["data.loading=stream", f"data.workers={workers}"]
        run(composed(*words, *more), str(tmp_path / str(workers)))
    assert same_bits(tmp_path / "0", tmp_path / "3")


class Kill(RoundCallback):
    """Kills a worker, as the system does when memory is short, or sends all of them a signal."""

    def __init__(self, number: int) -> None:
        self.number = number

    def round_ended(self, record: RoundRecord) -> None:
        if record.round == 1:
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
            for child in map(int, children.split()):
                if b"forkserver" not in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(child, self.number)


STREAMED = [*SITES, "data.loading=stream", "data.workers=1", "rounds=200", "eval_every=500"]


class Fail(RoundCallback):
    """Fails, or asks to stop, after a round."""

    def __init__(self, how: str) -> None:
        self.how = how

    def round_ended(self, record: RoundRecord) -> None:
        if record.round == 2 and self.how == "callback":
            raise ValueError("no")
        if record.round == 2 and self.how == "interrupt":
            raise KeyboardInterrupt


def open_files() -> Counter[str]:
    """The names of what is open, shared memory and pipes among them."""
    links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return Counter(os.readlink(link) for link in links if link.is_symlink())


@pytest.mark.parametrize("how", ["end", "callback", "interrupt", "loss"])
def test_no_worker_and_no_file_stays_open_after_a_run(how: str, tmp_path: Path) -> None:
    """Also while the caller keeps the error, which refers to the run."""
    gc.collect()
    files = open_files()
    before, errors = processes.children(), []
    words = [*SITES, "data.loading=stream", "data.workers=3", "rounds=4", "eval_every=2"]
    words += ["optimizer.lr=1e30"] if how == "loss" else []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also torch's, of more workers than CPUs
        try:
            fedtan_hpc.run(composed(*words, f"run_dir={tmp_path}"), callbacks=[Fail(how)])
        except (RunError, KeyboardInterrupt) as error:
            errors.append(error)
    assert len(errors) == (how != "end")
    assert set(processes.children()) <= set(before)
    gc.collect()
    assert not open_files() - files


def test_a_single_batch_is_evaluated_without_a_worker(tmp_path: Path) -> None:
    config = composed("data=synthetic", "data.samples=200", "data.shape=[3,8,8]")
    dataset = datasets.load(config.data, 0)
    reader = loading.Reader(dataset, torch.device("cpu"), torch.float32, 2)
    before = set(processes.children())
    for number, workers in ((1, 0), (2, 2)):
        requests = [loading.Request(dataset.test[:3], None)] * number
        batches = reader.batches(requests)
        next(batches)
        assert len(set(processes.children()) - before) == workers
        assert len(list(batches)) == number - 1


@pytest.mark.parametrize(
    ("variables", "workers"),
    [
        ({}, 8),
        ({"SLURM_CPUS_PER_TASK": "4"}, 3),
        ({"SLURM_CPUS_PER_TASK": "1"}, 1),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, 3),
    ],
)
def test_the_ranks_of_a_node_share_its_cpus(
    variables: dict[str, str], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CPUS_PER_TASK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert loading.workers_of(composed("data=synthetic")) == workers


@pytest.mark.slow
def test_a_set_of_20_gigabytes_is_streamed_in_little_memory(tmp_path: Path) -> None:
    """Samples take 24 GB; rank and workers together need less than 2 GB."""
    words = ["data=synthetic", "data.samples=50000", "data.shape=[3,224,224]", "partition=iid"]
    words += ["model=import", "model.target=bench.loaders:tiny", "data.workers=1", "batch_size=8"]
    words += ["clients=4", "local_steps=2", "rounds=2", "eval_every=2", "eval_train_samples=16"]
    (tmp_path / "bench").symlink_to(commands.ROOT / "tools" / "bench")
    script = tmp_path / "job.py"
    script.write_text(
        "from bench import processes\nfrom fedtan_hpc import cli\n"
        "peaks = processes.MemoryPeaks()\npeaks.start()\n"
        "try:\n    cli.main()\nfinally:\n    peaks.finish()\n    print(peaks.everything)\n"
    )
    options = ("data.test_samples=16", "data.loading=stream", f"run_dir={tmp_path / 'run'}")
    done = commands.run("python", str(script), *words, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.partition("data.loading=stream (")[2].split()[0]) > 20
    assert 2e8 < int(done.stdout.split()[-1]) < 2e9


def killed(folder: str, number: int, rounds: int) -> str:
    config = composed(*STREAMED, f"rounds={rounds}", f"run_dir={folder}")
    try:
        fedtan_hpc.run(config, callbacks=[Kill(number)])
    except RunError as error:
        return str(error)
    return ""


def test_a_worker_that_dies_is_one_line(tmp_path: Path) -> None:
    message = killed(str(tmp_path), signal.SIGKILL, 200)
    assert message.startswith("rank 0, round ")
    assert "DataLoader worker" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError()]
)
def test_a_worker_that_dies_in_the_middle_is_named_too(error: Exception) -> None:
    def results() -> Iterator[object]:
        raise error
        yield

    with pytest.raises(RuntimeError) as caught:
        loading._next(results())
    assert loading.is_worker_error(caught.value)


def test_workers_outlive_the_signals_of_a_batch_system(tmp_path: Path) -> None:
    assert killed(str(tmp_path), signal.SIGTERM, 4) == ""


@pytest.mark.parametrize("loading_option", ["auto", "device"])
def test_samples_that_do_not_fit_are_streamed_or_refused(
    loading_option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loading, "free_bytes", lambda *_: 40_000)
    config = imported("sites", "partition=natural", f"data.loading={loading_option}")
    config.run_dir = str(tmp_path / "run")
    if loading_option == "auto":
        fedtan_hpc.run(config, callbacks=[])
        return
    with pytest.raises(ConfigError) as caught:
        fedtan_hpc.run(config, callbacks=[])
    assert str(caught.value).startswith(
        "data.loading=device: allowed is auto or stream, for device needs 0.00 GB"
    )
    assert not (tmp_path / "run").exists()


def test_the_need_follows_from_ranks_and_participation() -> None:
    info = DatasetInfo(train=1000, test=200, shape=(3, 4, 4), classes=10)
    whole = composed("data=synthetic", "clients=10", "eval_train_samples=0")
    few = composed("data=synthetic", "clients=10", "clients_per_round=1", "eval_train_samples=0")
    cpu = torch.device("cpu")
    need = loading.Need(info, 10**7)
    sizes = [loading.is_streamed(each, need, cpu, 1)[1] for each in (whole, few)]
    assert sizes[0].startswith("12.00 GB of samples on a rank")
    assert sizes[1].startswith("4.00 GB of samples on a rank")
    fedbn = composed("data=synthetic", "clients=4", "algorithm=fedbn")
    unequal = loading.Need(info, 1, sizes=[10, 500, 20, 470])
    assert unequal.bytes(fedbn, ranks=2) == 970 + 200


def test_a_run_goes_on_with_another_loading(tmp_path: Path) -> None:
    words = [*SETTINGS["drawn"], "rounds=4", "checkpoint.every=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(composed(*words, "data.loading=device"), str(whole))
    run_until(composed(*words, "data.loading=device", f"run_dir={parts}"), 2)
    run(composed(*words, "data.loading=stream", "data.workers=1"), str(parts))
    assert same_bits(whole, parts)


def test_how_samples_are_read_does_not_name_the_folder() -> None:
    names = {run_dir.name(composed(*SITES, f"data.loading={way}")) for way in ("device", "stream")}
    [name] = names
    assert name.name.startswith("fedtan-sites-cnn-natural-")
