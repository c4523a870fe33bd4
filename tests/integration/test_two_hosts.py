"""Jobs across two hosts with separate addresses, made by ``tools/two_hosts.sh``; needs root.

The hosts are network namespaces of this machine.  The link between them can be cut and slowed down.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TWO_HOSTS = str(commands.ROOT / "tools" / "two_hosts.sh")
LONG = ("clients=2", "rounds=400", "local_steps=1", "checkpoint.every=10", "run_dir=run")
"""Options of a job with enough rounds to be interrupted."""
PORT = 29517
"""Free, since only these tests use the two hosts."""
RECEIVE = f"""
import socket
with socket.create_server(("th-a", {PORT})) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    with connection:
        while connection.recv(65536):
            pass
        connection.sendall(b"!")
"""
SEND = f"""
import socket, time
with socket.create_connection(("th-a", {PORT})) as connection:
    begin = time.monotonic()
    connection.sendall(bytes(4_000_000))
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1) == b"!"
    print(time.monotonic() - begin)
"""


def call(*words: str) -> None:
    done = subprocess.run([TWO_HOSTS, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Starts the two hosts; hosts that run already stay up afterwards."""
    running = subprocess.run([TWO_HOSTS, "status"], capture_output=True, check=False)
    started = subprocess.run([TWO_HOSTS, "start"], capture_output=True, text=True, check=False)
    if started.returncode == 2:
        pytest.skip(f"no two hosts here: {started.stderr.strip()}")
    assert started.returncode == 0, started.stderr
    yield
    if running.returncode:
        call("stop")


@pytest.fixture(autouse=True)
def sound_link(hosts: None) -> None:
    call("link", "up")
    call("rate", "none")


class Agents:
    """A job with a torchrun agent on each host; the output of each agent goes to files."""

    def __init__(self, folder: Path, name: str, *overrides: str) -> None:
        self.errors = [folder / f"{name}-{host}.err" for host in (0, 1)]
        self.outputs = [folder / f"{name}-{host}.out" for host in (0, 1)]
        self.processes = [self._start(host, folder, overrides) for host in (0, 1)]

    def _start(self, host: int, folder: Path, overrides: tuple[str, ...]) -> subprocess.Popen[str]:
        meeting = ("--local-addr", ("th-a", "th-b")[host], "--rdzv-endpoint", f"th-a:{PORT}")
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d")
        size = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "x")
        with self.outputs[host].open("w") as output, self.errors[host].open("w") as errors:
            return subprocess.Popen(
                [
                    TWO_HOSTS,
                    "exec",
                    str(host),
                    *torchrun,
                    *meeting,
                    *size,
                    "-m",
                    "fedtan_hpc",
                    *overrides,
                ],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(commands.ROOT), "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=errors,
                text=True,
            )

    def stderr(self, host: int) -> str:
        """Returns what the agent has written to standard error."""
        return self.errors[host].read_text()

    def finished(self, seconds: float) -> list[int]:
        """Waits for the agents and returns their exit codes."""
        deadline = time.monotonic() + seconds
        return [process.wait(deadline - time.monotonic()) for process in self.processes]

    def end(self) -> None:
        """Ends agents that still run; torchrun ends its ranks on SIGTERM."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(60)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Agents]]:
    """Starts agents in the test's folder, and ends them after the test."""
    started: list[Agents] = []

    def begin(name: str, *overrides: str) -> Agents:
        started.append(Agents(tmp_path, name, *overrides))
        return started[-1]

    yield begin
    call("link", "up")
    for agents in started:
        agents.end()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def same_models(a: Path, b: Path) -> bool:
    first, second = torch.load(a / "model.pt"), torch.load(b / "model.pt")
    return all(torch.equal(first[name], second[name]) for name in second)


def undisturbed(folder: Path, *overrides: str) -> Path:
    """Runs the job on one host and returns its run folder."""
    folder.mkdir()
    done = commands.ranks(2, *overrides, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_job_across_two_hosts_equals_one_on_one_host(
    start: Callable[..., Agents], tmp_path: Path
) -> None:
    options = ("clients=2", "rounds=20", "local_steps=1", "run_dir=run")
    job = start("job", *options)
    assert job.finished(90) == [0, 0], job.stderr(0) + job.stderr(1)
    assert "nodes 2, ranks 2" in job.outputs[0].read_text()
    assert same_models(tmp_path / "run", undisturbed(tmp_path / "one", *options))


def test_a_cut_link_is_reported_on_both_hosts_and_the_run_resumes(
    start: Callable[..., Agents], tmp_path: Path
) -> None:
    """Neither rank can tell a cut link from a host that hangs, so each blames the other.

    The agent that does not serve the rendezvous waits for it longer than the ranks wait.
    """
    options = (*LONG, "comm.timeout_seconds=8")
    job = start("cut", *options)
    wait_until(lambda: lines_of(tmp_path / "run" / "rounds.jsonl") >= 30, 60)
    call("link", "down")
    wait_until(
        lambda: "rank 1 hangs" in job.stderr(0) or "do not reach each other" in job.stderr(0), 9
    )
    wait_until(lambda: "rank 0, or the host that serves the ranks, hangs" in job.stderr(1), 3)
    assert not (tmp_path / "run" / "model.pt").exists()
    assert job.processes[0].wait(20) != 0
    call("link", "up")
    assert job.processes[1].wait(90) != 0
    job = start("on", *options)
    assert job.finished(120) == [0, 0], job.stderr(0) + job.stderr(1)
    assert lines_of(tmp_path / "run" / "rounds.jsonl") == 400
    assert same_models(tmp_path / "run", undisturbed(tmp_path / "one", *LONG))


def test_the_rate_of_the_link_is_limited() -> None:
    """4 MB take 0.8 s at 40 Mbit/s, and some milliseconds without a limit."""
    unlimited = seconds_to_send()
    call("rate", "40mbit")
    assert seconds_to_send() > 5 * unlimited


def seconds_to_send() -> float:
    receive = [TWO_HOSTS, "exec", "0", sys.executable, "-c", RECEIVE]
    with subprocess.Popen(receive, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "listening\n"
        send = [TWO_HOSTS, "exec", "1", sys.executable, "-c", SEND]
        sent = subprocess.run(send, capture_output=True, text=True, check=True, timeout=60)
    return float(sent.stdout)
