"""The command line in processes of its own: exit codes, who speaks, and that nobody hangs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

import fedtan_hpc
from fedtan_hpc import __version__, cli
from fedtan_hpc.config.schema import Config
from fedtan_hpc.launch import submitit_jobs
from fedtan_hpc.runtime import malloc
from tests.helpers import commands

SHORT = ("rounds=2", "local_steps=2", "eval_every=1")

# Rank 1 fails in round 2 for a reason of its own.
TORCHRUN = ("torchrun", "--nproc-per-node", "2", "-m", "fedtan_hpc")
FAULT = """
from fedtan_hpc.distributed import process_group as comm
from fedtan_hpc.training.cohort import Cohort
begin_round = Cohort.begin_round
def faulty(self, context):
    if comm.rank() == 1 and context.number == 2:
        raise OSError("the disk of this node is gone")
    return begin_round(self, context)
Cohort.begin_round = faulty
from fedtan_hpc.cli import main
main()
"""
KEY = """
import os, runpy, signal, sys, time
class Key:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            class Named:
                def __set_name__(self, owner, name):  # Python makes another error of an exception
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(5)
            type("Owner", (), {"name": Named()})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
sys.meta_path.insert(0, Key())
module = sys.argv.pop()
runpy.run_module("fedtan_hpc", run_name="__main__")
"""


@pytest.mark.parametrize(
    "overrides",
    [
        ("rounds=abc",),
        ("algorithm=fedprox", "clients=1"),
        ("clients=1", "device=cuda", "comm.backend=gloo"),
        ("clients=1", "run_dir=/dev/null/run"),
        ("--bogus",),
        ("--help=modle",),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_code_2(overrides: tuple[str, ...], tmp_path: Path) -> None:
    import torch

    if "device=cuda" in overrides and torch.cuda.is_available():
        pytest.skip("device=cuda is no mistake on a machine with a GPU")
    done = commands.job(*overrides, cwd=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("fedtan_hpc: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_point_of_a_sweep_that_diverges_does_not_stop_the_others(tmp_path: Path) -> None:
    swept = ("-m", "clients=2", *SHORT, "optimizer.lr=1e38,0.1", "run_dir=lr${optimizer.lr}")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    for done in (
        commands.job(*swept, cwd=tmp_path / "one"),
        commands.ranks(2, *swept, cwd=tmp_path / "two"),
    ):
        assert done.returncode == 1
        assert "fedtan_hpc: 1 of 2 points failed: lr1e+38: round" in done.stderr
        assert done.stderr.count("points failed") == 1
        assert "Traceback" not in done.stderr
    for folder in ("one", "two"):
        assert (tmp_path / folder / "lr0.1" / "summary.json").exists()
        assert not (tmp_path / folder / "lr1e+38" / "summary.json").exists()


def test_the_version_is_ours(tmp_path: Path) -> None:
    done = commands.job("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"fedtan_hpc {__version__}\n")


def test_a_reader_that_leaves_is_no_failure(tmp_path: Path) -> None:
    """As with ``| head -1``."""
    command = (
        f"'{sys.executable}' -m fedtan_hpc {' '.join(SHORT)} | head -1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(commands.ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("0", "141")


@pytest.mark.parametrize("overrides", [("rounds=0", "clients=2"), ("foo=1",)])
def test_under_torchrun_the_line_stands_once(overrides: tuple[str, ...], tmp_path: Path) -> None:
    start = time.monotonic()
    done = commands.run(*TORCHRUN, *overrides, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("fedtan_hpc: ") == 1
    assert f"fedtan_hpc: {overrides[0]}: " in done.stderr
    assert time.monotonic() - start < 60


def test_a_run_ends_with_its_accuracy_and_is_not_repeated(tmp_path: Path) -> None:
    first = commands.run(*TORCHRUN, "clients=2", *SHORT, "run_dir=here", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    accuracy = json.loads((tmp_path / "here" / "summary.json").read_text())["test_accuracy"]
    assert f"{100 * accuracy:.2f} %" in first.stdout
    assert "launcher torchrun, nodes 1, ranks 2, backend gloo, device cpu" in first.stdout
    again = commands.ranks(2, "clients=2", *SHORT, "run_dir=here", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "finished" in again.stdout
    assert f"{100 * accuracy:.2f} %" in again.stdout


def test_a_sweep_runs_every_point_in_one_start(tmp_path: Path) -> None:
    done = commands.ranks(2, "-m", "clients=2", *SHORT, "seed=0,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 2
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULT)
    overrides = ("clients=2", *SHORT, "run_dir=here")
    start = time.monotonic()
    done = commands.run("torchrun", "--nproc-per-node", "2", "faulty.py", *overrides, cwd=tmp_path)
    assert done.returncode != 0
    message = "fedtan_hpc: rank 1, round 2: OSError: the disk of this node is gone"
    assert done.stderr.count(message) == 1
    assert time.monotonic() - start < 60
    assert len((tmp_path / "here" / "rounds.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "here" / "summary.json").exists()


def test_a_loss_that_is_not_finite_is_told_once(tmp_path: Path) -> None:
    done = commands.ranks(2, "clients=2", *SHORT, "optimizer.lr=1e30", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("fedtan_hpc: round 1: the training loss of clients") == 1


@pytest.mark.parametrize(
    ("word", "text"), [("--help", "Choices, written"), ("--help=model", "model.target=null\n")]
)
def test_one_rank_shows_help(word: str, text: str, tmp_path: Path) -> None:
    done = commands.ranks(2, word, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count(text) == 1
    assert not list(tmp_path.iterdir())


def test_options_are_checked_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, fedtan_hpc.cli as cli; sys.argv = ['x', 'rounds=3']; cli.compose(); "
        "cli.compose(['--help=all']); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = commands.run("python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_agents_as_on_two_machines_make_one_job(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    words = ("--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint={endpoint}", "-m", "fedtan_hpc")
    overrides = ("clients=2", *SHORT, "run_dir=here")
    with ThreadPoolExecutor() as pool:
        agents = [
            pool.submit(commands.run, "torchrun", *words, *overrides, cwd=tmp_path) for _ in "ab"
        ]
        done = [agent.result() for agent in agents]
    assert [agent.returncode for agent in done] == [0, 0], done[0].stderr + done[1].stderr
    assert sum(agent.stdout.count("Result") for agent in done) == 1
    assert json.loads((tmp_path / "here" / "summary.json").read_text())["world_size"] == 2


def test_a_mistake_in_any_point_of_a_sweep_stops_it_before_the_first(tmp_path: Path) -> None:
    """Also one that shows only when the network is made: 128 channels are no 3 groups."""
    words = ("-m", "algorithm=fedavg_gn", "algorithm.groups=2,3", *SHORT)
    done = commands.job(*words, cwd=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("fedtan_hpc: algorithm.groups=3: ")
    assert not list(tmp_path.iterdir())


def test_only_commands_and_submitted_jobs_change_the_memory_of_their_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that calls ``run`` keeps its malloc as it is."""
    calls: list[str] = []
    monkeypatch.setattr(malloc, "keep_freed_memory", lambda: calls.append("malloc"))
    config = Config(clients=2, rounds=1, run_dir=str(tmp_path / "run"))
    fedtan_hpc.run(config, callbacks=[])
    assert not calls
    monkeypatch.setattr("sys.argv", ["fedtan_hpc", *SHORT, f"run_dir={tmp_path / 'command'}"])
    cli.main()
    assert calls == ["malloc"]
    environment = SimpleNamespace(cluster="debug")
    monkeypatch.setattr("submitit.JobEnvironment", lambda: environment)
    submitit_jobs.Job(config)()
    assert calls == ["malloc"] * 2


@pytest.mark.parametrize(
    "module", ["fedtan_hpc.cli", "hydra.types", "torch.utils", "sklearn.datasets"]
)
def test_ctrl_c_while_modules_load_leaves_no_traceback(module: str, tmp_path: Path) -> None:
    done = commands.run("python", "-c", KEY, module, cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr == "fedtan_hpc: interrupted\n"
    assert not list(tmp_path.rglob("*.json"))  # not failed; the folder of the run may be there
