"""Runs a function on several ranks that have a process group.

``on_ranks(2, function, argument)`` calls ``function(argument)`` on 2 ranks and returns the results
by rank.  The ranks wait for the next call.  A rank that fails fails the test with its traceback;
then its world ends, and the next call starts a new one.

The ranks are forked from a server that has loaded torch, and use gloo.  With TEST_BACKEND=mpi in
the environment mpiexec starts them and they use MPI, so that all tests can run over both.
``on_gpus`` gives each rank a GPU and uses NCCL.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fedtan_hpc.distributed import process_group
from fedtan_hpc.runtime import launcher_env

Result = TypeVar("Result")

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["fedtan_hpc.job.run", "sklearn.datasets", "sklearn.model_selection", "torch.utils.tensorboard"]
)


class RankFailed(AssertionError):
    """A rank has failed; the message has its traceback."""


def on_ranks(
    world_size: int, function: Callable[..., Result], *arguments: Any, seconds: float = 60
) -> list[Result]:
    """The results of ``function(*arguments)`` by rank; ``function`` must be importable."""
    world = _WORLDS.get(world_size) or _world_of(world_size)
    _WORLDS[world_size] = world
    try:
        return world.call(function, arguments, seconds)
    except BaseException:
        del _WORLDS[world_size]
        world.end()
        raise


def on_gpus(
    world_size: int, function: Callable[..., Result], *arguments: Any, seconds: float = 120
) -> list[Result]:
    """The results of ``function(*arguments)`` by rank, of new ranks; rank k has GPU k."""
    world = ForkedWorld(world_size, "nccl")
    try:
        return world.call(function, arguments, seconds)
    finally:
        world.end()


class World:
    """Processes with a process group, each waiting for the next function."""

    _connections: list[Connection]

    def call(self, function: Callable[..., Any], arguments: Any, seconds: float) -> list[Any]:
        """Sends the function to all ranks and waits for all answers."""
        task = pickle.dumps((function, arguments))
        for connection in self._connections:
            connection.send_bytes(task)
        return _collect(self._connections, seconds)

    def end(self) -> None:
        """Kills the processes."""
        raise NotImplementedError


class ForkedWorld(World):
    """Forked processes."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self._folder = tempfile.mkdtemp()
        store = Path(self._folder) / "rendezvous"
        started = [_start(rank, size, store, backend) for rank in range(size)]
        self._processes = [process for process, _ in started]
        self._connections = [connection for _, connection in started]

    def end(self) -> None:
        for process, connection in zip(self._processes, self._connections, strict=True):
            connection.close()
            process.kill()
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)


class MPIWorld(World):
    """Processes of mpiexec, which connect to this process and send their rank."""

    def __init__(self, size: int) -> None:
        with Listener(family="AF_UNIX") as listener:
            words = [sys.executable, "-m", "tests.helpers.ranks", str(listener.address)]
            paths = os.pathsep.join(map(str, [ROOT, ROOT / "tools"]))  # as pytest's pythonpath
            self._launcher = subprocess.Popen(
                [MPIEXEC, "-n", str(size), *words],
                cwd=ROOT,
                env={**os.environ, **MPI_VARIABLES, "PYTHONPATH": paths},
            )
            callers = [listener.accept() for _ in range(size)]
        by_rank = sorted(((caller.recv(), caller) for caller in callers), key=lambda pair: pair[0])
        self._connections = [caller for _, caller in by_rank]

    def end(self) -> None:
        for connection in self._connections:
            connection.close()
        self._launcher.kill()
        self._launcher.wait()


MPIEXEC = str(Path(sys.executable).parent / "mpiexec")
MPI_VARIABLES = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}
"""Open MPI refuses root, and more ranks than cores, without these."""


def _world_of(size: int) -> World:
    return MPIWorld(size) if os.environ.get("TEST_BACKEND") == "mpi" else ForkedWorld(size)


_WORLDS: dict[int, World] = {}


@atexit.register
def _end_all() -> None:
    for world in _WORLDS.values():
        world.end()


def _start(rank: int, size: int, store: Path, backend: str) -> tuple[ForkServerProcess, Connection]:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_serve, args=(rank, size, store, backend, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(rank: int, size: int, store: Path, backend: str, caller: Connection) -> None:
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=30),
    )
    _answer_calls(caller)


def _serve_over_mpi(address: str) -> None:
    info = launcher_env.detect()
    with Client(address, family="AF_UNIX") as caller:
        caller.send(info.rank)
        process_group.start(info.rank, info.world_size, "mpi", 30)
        _answer_calls(caller)
    os._exit(0)  # MPI would wait for the others


def _answer_calls(caller: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = pickle.loads(caller.recv_bytes())
            # Plain pickle: torch's pickler leaves tensors in memory that ends with this process.
            answer = pickle.dumps((True, function(*arguments)))
        except EOFError:
            return
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        caller.send_bytes(answer)


def _collect(connections: list[Connection], seconds: float) -> list[Any]:
    deadline = time.monotonic() + seconds
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        waiting = [c for rank, c in enumerate(connections) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = [connections.index(c) for c in waiting]
            raise RankFailed(f"no answer within {seconds} s from ranks {silent}")
        for rank, connection in enumerate(connections):
            if connection in ready:
                results[rank] = _answer(connection, rank)
    return [results[rank] for rank in range(len(connections))]


def _answer(connection: Connection, rank: int) -> Any:
    try:
        good, value = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        raise RankFailed(f"rank {rank} ended without an answer") from None
    if not good:
        raise RankFailed(f"rank {rank}:\n{value}")
    return value


if __name__ == "__main__":
    from tests.helpers import ranks  # not as __main__, for the names of what is pickled

    ranks._serve_over_mpi(sys.argv[1])
