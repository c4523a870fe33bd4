"""The rank that the watchdog names, and how jobs end that hang or lose a rank.

The first tests use a store in this process; the slow ones run whole jobs with faults.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from fedtan_hpc.distributed import counters, process_group
from fedtan_hpc.distributed.channel import Channel
from fedtan_hpc.distributed.counters import Progress
from fedtan_hpc.distributed.watchdog import Process, Watchdog
from tests.helpers import commands
from tests.helpers.ranks import MPI_VARIABLES, MPIEXEC

FAULTY = str(Path(__file__).parents[1] / "helpers" / "faulty.py")
SHORT = ("rounds=40", "local_steps=1", "clients=2", "checkpoint.every=5")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
MPIRUN = (MPIEXEC, "-n", "2", sys.executable)


class Store:
    """A stand-in for torch's store, as far as the channel uses it."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, text: str) -> None:
        self.values[key] = text

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@pytest.mark.parametrize(
    ("begun", "round_number", "verdict"),
    [
        ([9, 8, 9], 4, "rank 1 hangs in round 4"),
        ([9, 8, 3], 4, "ranks [1, 2] hang in round 4"),
        ([9, None, 9], 0, "rank 1 hangs before the first round"),
        ([9, 9, 9], 4, "in round 4: the ranks do not reach each other"),
    ],
)
def test_the_rank_that_has_begun_fewer_collectives_is_named(
    begun: list[int | None],
    round_number: int,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    channel = Channel(Store(), "a secret")
    for rank, number in enumerate(begun):
        if number is not None:
            channel.write(f"collectives/{rank}", f"{number} 0")
    monkeypatch.setattr(counters, "progress", Progress(round=round_number, collectives=9))
    monkeypatch.setattr(process_group, "world_size", lambda: len(begun))
    watchdog = Watchdog(channel, 30, print)
    assert watchdog._verdict(watchdog._behind()).startswith(verdict)


@pytest.mark.parametrize(
    ("begun", "rank", "verdict"),
    [
        (["9 4", "9 4", "8 5", "8 4"], 0, "rank 3 of the client on ranks 2 to 3 hangs in round 4"),
        (["9 4", "9 3", "9 1", "9 1"], 0, "rank 1 of the client on ranks 0 to 1 hangs in round 4"),
        (["8 5", "8 4", "9 1", "9 1"], 0, "rank 1 of the client on ranks 0 to 1 hangs in round 4"),
        (["9 4", "9 4", "8 3", "8 3"], 1, "ranks [2, 3] hang in round 4"),
        (["9 4 7", "9 3 7"], 0, "rank 1 of client 7 on ranks 0 to 1 hangs in round 4"),
        (["9 4 7", "9 3 5"], 0, "rank 1 of the client on ranks 0 to 1 hangs in round 4"),
    ],
)
def test_a_rank_that_waits_for_another_of_its_client_is_not_blamed(
    begun: list[str], rank: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has begun sums of all ranks, and sums with the other rank of its client."""
    channel = Channel(Store(), "a secret")
    for number, text in enumerate(begun):
        channel.write(f"collectives/{number}", text)
    of_all, of_client = map(int, begun[rank].split()[:2])
    progress = Progress(round=4, collectives=of_all, client_collectives=of_client)
    monkeypatch.setattr(counters, "progress", progress)
    monkeypatch.setattr(process_group, "world_size", lambda: len(begun))
    monkeypatch.setattr(process_group, "rank", lambda: rank)
    monkeypatch.setattr(
        process_group, "ranks_of_client", lambda member: [member // 2 * 2, member // 2 * 2 + 1]
    )
    watchdog = Watchdog(channel, 30, print)
    assert watchdog._verdict(watchdog._behind()).startswith(verdict)


def test_only_a_wait_that_is_too_long_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    monkeypatch.setattr(counters, "progress", progress)
    watchdog = Watchdog(Channel(Store()), 10, print)
    assert not watchdog._has_waited(8)
    progress.waiting_since = time.monotonic() - 5
    assert not watchdog._has_waited(8)
    progress.waiting_since = time.monotonic() - 9
    assert watchdog._has_waited(8)


class SlowStore(Store):
    """A store that answers slowly."""

    is_asked = False

    def check(self, keys: list[str]) -> bool:
        self.is_asked = True
        time.sleep(0.5)
        return super().check(keys)


def test_no_check_outlasts_the_end() -> None:
    """torch aborts the process if Python shuts down while a thread is inside the store."""
    store, threads = SlowStore(), threading.active_count()
    watchdog = Watchdog(Channel(store, "a secret"), 0.2, print)
    watchdog.begin()
    while not store.is_asked:
        time.sleep(0.01)
    watchdog.end()
    assert threading.active_count() == threads


def test_a_stopped_process_is_killed_and_no_other_that_has_its_number() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        process = Process.of(sleeper.pid)
        assert process is not None
        os.kill(sleeper.pid, signal.SIGSTOP)
        for other in (process._replace(started="1"), process._replace(machine="another")):
            other.kill()
        assert sleeper.poll() is None
        process.kill()
        assert sleeper.wait(10) == -signal.SIGKILL


class Left(BaseException):
    """Stands for the end of the process."""


def test_a_rank_that_ends_because_of_a_verdict_prints_and_records_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not only the rank that has given it, whose output may be lost."""

    def leave(code: int) -> NoReturn:
        raise Left(code)

    reported: list[str] = []
    channel = Channel(Store(), "a secret")
    watchdog = Watchdog(channel, 1, reported.append)
    channel.write("verdict", "rank 1 hangs")
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left, match="1"):
        watchdog._check_ranks()
    assert "fedtan_hpc: rank 0 ends: rank 1 hangs" in capfd.readouterr().err
    assert reported == ["rank 0 ends: rank 1 hangs"]


def start(
    launcher: tuple[str, ...], folder: Path, run: str, faults: str = "", *overrides: str
) -> subprocess.Popen[str]:
    """Starts the job with ``faults`` on two ranks; run_dir is ``run``."""
    if "torch.distributed.run" in launcher:  # a free port, so that jobs do not meet
        launcher = (*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    return subprocess.Popen(
        [*launcher, FAULTY, *SHORT, f"run_dir={run}", *overrides],
        cwd=folder,
        env={
            **os.environ,
            **MPI_VARIABLES,
            "PYTHONPATH": str(commands.ROOT),
            "OMP_NUM_THREADS": "1",
            "FAULTS": faults,
            "FAULTS_FOLDER": str(folder),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str], seconds: float = 100) -> tuple[int, str]:
    """Waits for the job and returns its exit code and standard error."""
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, errors


def rounds_of(run: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (run / "rounds.jsonl").read_text().splitlines()]


def same_models(a: Path, b: Path) -> bool:
    first, second = torch.load(a / "model.pt"), torch.load(b / "model.pt")
    return all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "rank", "kind"),
    [
        (TORCHRUN, 1, "sleep"),
        (TORCHRUN, 0, "stop"),
        (MPIRUN, 0, "sleep"),
        (MPIRUN, 1, "stop"),
        (MPIRUN, 0, "stop"),
    ],
)
def test_a_rank_that_hangs_is_named_and_all_end(
    launcher: tuple[str, ...], rank: int, kind: str, tmp_path: Path
) -> None:
    process = start(launcher, tmp_path, "run", f"{rank}:7:{kind}", "comm.timeout_seconds=8")
    code, errors = finished(process)
    assert code != 0, errors
    verdict = f"rank {rank} hangs in round 7"
    if (launcher, rank, kind) == (MPIRUN, 0, "stop"):  # over MPI rank 0 serves the channel
        verdict = "round 7: rank 0, or the host that serves the ranks, hangs, is gone or cannot"
    assert verdict in errors
    assert seconds_since(tmp_path / f"{rank}-7-{kind}") < 14, "longer than the time-out and 6 s"
    note = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert verdict in note["message"]


def seconds_since(mark: Path) -> float:
    return time.time() - mark.stat().st_mtime


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exit", "interrupt"])
def test_an_exit_of_the_users_code_is_that_of_its_rank(kind: str, tmp_path: Path) -> None:
    code, errors = finished(start(TORCHRUN, tmp_path, "run", f"1:7:{kind}"))
    assert code != 0
    name = {"exit": "SystemExit: 0", "interrupt": "KeyboardInterrupt: a key"}[kind]
    assert f"fedtan_hpc: rank 1, round 7: {name}" in errors
    note = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert note["message"] == f"rank 1, round 7: {name}"


@pytest.mark.slow
def test_sigterm_to_torchrun_ends_the_job_in_seconds(tmp_path: Path) -> None:
    """And until then its ranks listen on the loopback interface alone."""
    process = start(TORCHRUN, tmp_path, "run", "", "rounds=100000", "eval_every=100000")
    lines = tmp_path / "run" / "rounds.jsonl"
    while not lines.exists():
        time.sleep(0.1)
        assert process.poll() is None
    time.sleep(1)
    for rank in workers_of(process.pid):
        assert listening_of(rank) <= {"0100007F"}
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, errors = finished(process)
    assert code != 0
    assert time.monotonic() - began < 8, "2 s where the machine is quiet; it was 16 s"
    last = rounds_of(tmp_path / "run")[-1]
    assert f"stopped by SIGTERM after round {last}" in errors
    assert (tmp_path / "run" / "checkpoints" / f"round-{last:06d}.pt").exists()


def listening_of(process: int) -> set[str]:
    """Returns the addresses at which a process listens, as /proc writes them."""
    links = [os.readlink(each) for each in Path(f"/proc/{process}/fd").iterdir()]
    sockets = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    fields = [line.split() for table in tables for line in table]
    return {each[1].split(":")[0] for each in fields if each[3] == "0A" and each[9] in sockets}


@pytest.mark.slow
def test_a_killed_rank_costs_the_rounds_since_the_last_checkpoint(tmp_path: Path) -> None:
    """torchrun restarts the ranks; the model equals that of an undisturbed run in every bit."""
    code, errors = finished(start(TORCHRUN, tmp_path, "whole"))
    assert code == 0, errors
    restarting = (*TORCHRUN, "--max-restarts", "3")
    code, errors = finished(start(restarting, tmp_path, "hit", "1:7:kill 0:13:kill 1:22:error"))
    assert code == 0, errors
    assert "another rank has ended" in errors
    summary = json.loads((tmp_path / "hit" / "summary.json").read_text())
    assert summary["resumed_after"] == [5, 10, 20]
    assert rounds_of(tmp_path / "hit") == list(range(1, 41))
    assert same_models(tmp_path / "hit", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_killed_at_random_moments_cost_nothing(tmp_path: Path) -> None:
    """Ten kills hit start-up, rounds and writing alike, all before the run is complete."""
    more = ("rounds=3000", "checkpoint.every=10", "eval_every=500")
    code, errors = finished(start(TORCHRUN, tmp_path, "whole", "", *more), 300)
    assert code == 0, errors
    process = start((*TORCHRUN, "--max-restarts", "10"), tmp_path, "hit", "", *more)
    rng = random.Random(0)
    killed: set[int] = set()
    while len(killed) < 10:
        time.sleep(rng.uniform(1, 8))
        assert process.poll() is None, "it ended before the tenth"
        if workers := [each for each in workers_of(process.pid) if each not in killed]:
            victim = rng.choice(workers)
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
    code, errors = finished(process, 400)
    assert code == 0, errors
    assert rounds_of(tmp_path / "hit") == list(range(1, 3001))
    assert same_models(tmp_path / "hit", tmp_path / "whole")


def workers_of(agent: int) -> list[int]:
    """Returns the process ids of the ranks that torchrun has started."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [("TERM", 143), ("USR1", 138)])
def test_a_signal_to_one_rank_stops_all_after_the_round(
    kind: str, code: int, tmp_path: Path
) -> None:
    """The exit code tells the signal, and mpirun passes it on."""
    exit_code, errors = finished(start(MPIRUN, tmp_path, "run", f"1:7:{kind}"))
    assert exit_code == code, errors
    assert f"stopped by SIG{kind} after round 7" in errors
    code, errors = finished(start(MPIRUN, tmp_path, "run"))
    assert code == 0, errors
    assert rounds_of(tmp_path / "run") == list(range(1, 41))
