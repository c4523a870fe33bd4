"""A SLURM for the tests, which ``tools/dev_slurm.sh`` starts, and a user of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.helpers import commands

DEV_SLURM = str(commands.ROOT / "tools" / "dev_slurm.sh")
TRAIN = str(commands.ROOT / "slurm" / "train.sbatch")
SUBMIT = str(commands.ROOT / "slurm" / "submit.py")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


@contextmanager
def running(*where: str) -> Iterator[dict[str, str]]:
    """Gives the environment with which sbatch reaches the cluster; a running cluster stays."""
    before = subprocess.run([DEV_SLURM, "status"], capture_output=True, check=False)
    words = [DEV_SLURM, "start", *where]
    started = subprocess.run(words, capture_output=True, text=True, check=False)
    if started.returncode == 2:
        pytest.skip(f"no SLURM here: {started.stderr.strip()}")
    assert started.returncode == 0, started.stderr
    line = subprocess.run([DEV_SLURM, "env"], capture_output=True, text=True, check=True).stdout
    name, _, value = line.removeprefix("export ").strip().partition("=")
    launchers = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "OMPI_", "PMI_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(launchers)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    yield {
        **clean,
        name: value,
        "PATH": path,
        "PYTHONPATH": str(commands.ROOT),
        "OMP_NUM_THREADS": "1",
    }
    if before.returncode:
        subprocess.run([DEV_SLURM, "stop"], capture_output=True, check=False)


class Slurm:
    """Calls SLURM's commands in a folder; the words ``where`` before them choose the host."""

    def __init__(
        self, environment: dict[str, str], folder: Path, where: tuple[str, ...] = ()
    ) -> None:
        self.environment, self.folder, self.where = environment, folder, where
        self.jobs: list[str] = []

    def call(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(
            [*self.where, *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def sbatch(self, *words: str) -> str:
        """Submits train.sbatch; words with dashes are options of sbatch, the others of the job."""
        options = [word for word in words if word.startswith("-")]
        job = [word for word in words if not word.startswith("-")]
        number = self.call("sbatch", "--parsable", *options, TRAIN, *job).strip()
        self.jobs.append(number)
        return number

    def submit(self, *words: str) -> list[str]:
        """Calls ``slurm/submit.py``."""
        lines = self.call(sys.executable, SUBMIT, *words).splitlines()
        numbers = [line.split()[1] for line in lines]
        self.jobs += numbers
        return numbers

    def facts(self, job: str) -> dict[str, str]:
        words = self.call("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, job: str, seconds: float = 120) -> dict[str, str]:
        """Returns what SLURM says of the job once it has ended; a requeue takes ten seconds."""
        deadline = time.monotonic() + seconds
        while (facts := self.facts(job))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"{facts}\n{self.said()}"
            time.sleep(0.5)
        return facts

    def said(self) -> str:
        """Returns all that the jobs have written into their logs."""
        logs = [*self.folder.glob("*.log"), *self.folder.glob("runs/submitted/*log.*")]
        return "\n".join(path.read_text(errors="replace") for path in sorted(logs))

    def wait_for_round(self, number: int, run: str = "run") -> None:
        wait_until(lambda: len(rounds_of(self.folder / run)) >= number, 90)


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def rounds_of(run: Path) -> list[int]:
    path = run / "rounds.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["round"] for line in lines if line.endswith("}")]


def same_models(a: Path, b: Path) -> bool:
    first, second = torch.load(a / "model.pt"), torch.load(b / "model.pt")
    return all(torch.equal(first[name], second[name]) for name in second)
