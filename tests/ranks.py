"""Run a function on several ranks: forked from a server that has torch loaded, over gloo.

``on_ranks(2, function, argument)`` calls ``function(argument)`` on 2 ranks that have a process
group and returns the results by rank.  The ranks live on for the next call.  A rank that fails
fails the test with its traceback; then its world is ended, and the next call starts a new one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["fedtan_hpc.job", "sklearn.datasets", "sklearn.model_selection", "torch.utils.tensorboard"]
)


class RankFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


def on_ranks(
    world_size: int, function: Callable[..., Result], *arguments: Any, seconds: float = 60
) -> list[Result]:
    """Results of ``function(*arguments)`` on each rank; ``function`` must be importable."""
    world = _WORLDS.get(world_size) or World(world_size)
    _WORLDS[world_size] = world
    try:
        return world.call(function, arguments, seconds)
    except BaseException:
        del _WORLDS[world_size]
        world.end()
        raise


class World:
    """Processes with a process group, each waiting for the next function."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.mkdtemp()
        self._ranks = [
            _start(rank, size, Path(self._folder) / "rendezvous") for rank in range(size)
        ]

    def call(self, function: Callable[..., Any], arguments: Any, seconds: float) -> list[Any]:
        """Send the function to all ranks and wait for all answers."""
        return _collect(self._send(function, arguments), seconds)

    def _send(self, function: Callable[..., Any], arguments: Any) -> list[Connection]:
        task = pickle.dumps((function, arguments))
        for _, connection in self._ranks:
            connection.send_bytes(task)
        return [connection for _, connection in self._ranks]

    def end(self) -> None:
        """Kill the processes."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)


_WORLDS: dict[int, World] = {}


@atexit.register
def _end_all() -> None:
    for world in _WORLDS.values():
        world.end()


def _start(rank: int, size: int, store: Path) -> tuple[ForkServerProcess, Connection]:
    mine, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, mine


def _serve(rank: int, size: int, store: Path, caller: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=30),
    )
    while True:
        try:
            function, arguments = pickle.loads(caller.recv_bytes())
            # Plain pickle: torch's own way leaves tensors in memory that dies with this process.
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
        raise RankFailed(f"rank {rank} died without a word") from None
    if not good:
        raise RankFailed(f"rank {rank}:\n{value}")
    return value
