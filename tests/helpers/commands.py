"""Runs command lines as users do: in separate processes, with a folder and an exit code.

``run`` starts a new interpreter, as a shell does.  ``forked`` forks the processes from a server
that has loaded torch, because an interpreter's start takes longer than most commands; for torchrun
it starts the ranks itself, with the variables that torchrun sets.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.helpers.ranks import CONTEXT

ROOT = Path(__file__).parents[2]


def tool(name: str) -> str:
    """The path of a tool, for a command line."""
    return str(ROOT / "tools" / name)


def run(*words: str, cwd: Path, seconds: float = 90) -> subprocess.CompletedProcess[str]:
    """``python ...`` by this interpreter, or ``torchrun ...`` by its torchrun."""
    programs = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    if words[0] == "torchrun":  # a free port, so that jobs do not meet
        words = ("torchrun", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *words[1:])
    return subprocess.run(
        [*programs[words[0]], *words[1:]],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": _python_path(cwd), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def job(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``python -m fedtan_hpc`` with ``overrides``."""
    return forked("python", "-m", "fedtan_hpc", *overrides, cwd=cwd)


def ranks(number: int, *overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``torchrun --nproc-per-node number -m fedtan_hpc`` with ``overrides``."""
    words = ("torchrun", "--nproc-per-node", str(number), "-m", "fedtan_hpc", *overrides)
    return forked(*words, cwd=cwd)


def forked(*words: str, cwd: Path, seconds: float = 90) -> subprocess.CompletedProcess[str]:
    """``python ...`` or ``torchrun --nproc-per-node N ...``; the output of all ranks together.

    As under torchrun, a rank that fails ends the others, and the exit code is then 1.
    """
    number, program = 1, list(words[1:])
    if words[0] == "torchrun":
        assert program[0] == "--nproc-per-node"
        number, program = int(program[1]), program[2:]
    with TemporaryDirectory() as scratch:
        environments = _environments(number) if words[0] == "torchrun" else [{}]
        processes = [
            CONTEXT.Process(target=_child, args=(program, str(cwd), added, f"{scratch}/{rank}"))
            for rank, added in enumerate(environments)
        ]
        for process in processes:
            process.start()
        codes = _wait(processes, time.monotonic() + seconds)
        texts = [
            "".join(Path(f"{scratch}/{rank}.{stream}").read_text() for rank in range(number))
            for stream in ("out", "err")
        ]
    code = codes[0] if words[0] == "python" else int(any(codes))
    return subprocess.CompletedProcess(list(words), code, *texts)


def _wait(processes: Sequence[ForkServerProcess], deadline: float) -> list[int]:
    """The exit codes; ends all processes after a failure of one, or after the deadline."""
    while any(process.is_alive() for process in processes):
        failed = any(process.exitcode for process in processes)
        if failed or time.monotonic() > deadline:
            for process in processes:
                process.terminate()
        time.sleep(0.01)
    assert time.monotonic() < deadline, "it took too long"
    return [int(process.exitcode or 0) for process in processes]


def _environments(number: int) -> list[dict[str, str]]:
    """The variables that torchrun sets for each rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(number),
            "LOCAL_WORLD_SIZE": str(number),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
        }
        for rank in range(number)
    ]


def _child(program: Sequence[str], cwd: str, variables: Mapping[str, str], output: str) -> None:
    """Runs the program in this process as if an interpreter had started with it."""
    import torch

    torch.set_num_threads(1)
    os.chdir(cwd)
    os.environ.update(variables)
    for descriptor, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT), descriptor)
    sys.path[:0] = _python_path(Path(cwd)).split(os.pathsep)
    if program[0] == "-m":
        sys.argv = list(program[1:])
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = list(program)
    sys.path.insert(0, str(Path(program[0]).resolve().parent))
    runpy.run_path(program[0], run_name="__main__")


def _python_path(cwd: Path) -> str:
    return os.pathsep.join([str(ROOT), str(cwd)])
