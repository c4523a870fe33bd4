"""Run the command line as users do, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*words: str, cwd: Path, seconds: float = 90) -> subprocess.CompletedProcess[str]:
    """``words`` with this Python in place of ``python`` and its torchrun in place of torchrun."""
    start = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    if words[0] == "torchrun":  # a port of its own, so that jobs do not meet
        words = ("torchrun", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *words[1:])
    path = os.pathsep.join([str(ROOT), str(cwd)])
    return subprocess.run(
        [*start[words[0]], *words[1:]],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def job(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``python -m fedtan_hpc`` with ``overrides``."""
    return run("python", "-m", "fedtan_hpc", *overrides, cwd=cwd)


def ranks(number: int, *overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``torchrun --nproc-per-node number -m fedtan_hpc`` with ``overrides``."""
    words = ("torchrun", "--nproc-per-node", str(number), "-m", "fedtan_hpc", *overrides)
    return run(*words, cwd=cwd)
