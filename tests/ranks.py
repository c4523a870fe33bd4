"""Run a function on several ranks: forked from a server that has torch loaded, over gloo.

``on_ranks(2, function, argument)`` calls ``function(argument)`` on 2 ranks with a process group of
their own and returns the results by rank.  A rank that fails fails the test with its traceback,
and the other ranks are ended.
"""

from __future__ import annotations

import multiprocessing
import pickle
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

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["fedtan_hpc.job", "sklearn.datasets", "sklearn.model_selection", "torch.utils.tensorboard"]
)


class RankFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


def on_ranks(
    world_size: int, function: Callable[..., Result], *arguments: Any, seconds: float = 60
) -> list[Result]:
    """Results of ``function(*arguments)`` on each rank; ``function`` must be importable."""
    with tempfile.TemporaryDirectory() as folder:
        started = [
            _start(rank, world_size, Path(folder) / "rendezvous", function, arguments)
            for rank in range(world_size)
        ]
        try:
            return _collect(started, seconds)
        finally:
            for process, _ in started:
                process.kill()
                process.join()


def _start(
    rank: int, world_size: int, store: Path, function: Callable[..., Any], arguments: Any
) -> tuple[ForkServerProcess, Connection]:
    mine, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(
        target=_run, args=(rank, world_size, store, function, arguments, theirs), daemon=True
    )
    process.start()
    theirs.close()
    return process, mine


def _run(
    rank: int,
    world_size: int,
    store: Path,
    function: Callable[..., Any],
    arguments: Any,
    answer: Connection,
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=30),
        )
        # Plain pickle: torch's own way leaves tensors in memory that dies with this process.
        answer.send_bytes(pickle.dumps((True, function(*arguments))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answer.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _collect(started: list[tuple[ForkServerProcess, Connection]], seconds: float) -> list[Any]:
    deadline = time.monotonic() + seconds
    ranks = {connection: rank for rank, (_, connection) in enumerate(started)}
    results: dict[int, Any] = {}
    while len(results) < len(started):
        waiting = [c for c, rank in ranks.items() if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(
                f"no answer within {seconds} s from ranks {[ranks[c] for c in waiting]}"
            )
        for connection in ready:
            rank = ranks[connection]  # type: ignore[index]
            results[rank] = _answer(connection, rank)  # type: ignore[arg-type]
    return [results[rank] for rank in range(len(started))]


def _answer(connection: Connection, rank: int) -> Any:
    try:
        good, value = pickle.loads(connection.recv_bytes())
    except EOFError:
        raise RankFailed(f"rank {rank} died without a word") from None
    if not good:
        raise RankFailed(f"rank {rank}:\n{value}")
    return value
