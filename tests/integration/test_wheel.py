"""An installed wheel offers all commands in any folder: conf/ and train.sbatch travel in it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers import commands

COMMANDS = {
    "job": (("fedtan_hpc", "algorithm=fedavg", "--cfg", "job"), "name: fedavg"),
    "job, help": (("fedtan_hpc", "--help"), "algorithm=fedtan,fedavg"),
    "compare, help": (("fedtan_hpc.compare", "--help"), "-m fedtan_hpc.compare"),
    "overview, help": (("fedtan_hpc.overview", "--help"), "-m fedtan_hpc.overview"),
    "runs, help": (("fedtan_hpc.runs", "--help"), "-m fedtan_hpc.runs"),
    "partition": (("fedtan_hpc.show_partition", "out=p.png"), "picture: p.png"),
    "summary, help": (("fedtan_hpc.summarise_runs", "--help"), "-m fedtan_hpc.summarise_runs"),
    "submit, help": (("fedtan_hpc.submit", "--help"), "-m fedtan_hpc.submit"),
    "submit": (("fedtan_hpc.submit", "launch=local", "--cfg", "job"), "cluster: local"),
}
"""Words after ``python -m``, and what they print."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, and all else from the tests' environment.

    A line of a .pth file adds the folder of packages, but not the checkout that its own .pth files
    may name.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    words = ("wheel", "--no-deps", "--wheel-dir", str(folder), str(commands.ROOT))
    built = commands.run("python", *pip, *words, cwd=folder)
    assert built.returncode == 0, built.stderr
    [wheel] = folder.glob("fedtan_hpc-*.whl")
    made = commands.run("python", "-m", "venv", "--without-pip", "env", cwd=folder)
    assert made.returncode == 0, made.stderr
    python = folder / "env" / "bin" / "python"
    to_environment = ("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    installed = commands.run("python", *pip, *to_environment, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    [packages] = (folder / "env" / "lib").glob("python*/site-packages")
    (packages / "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, *words: str, cwd: Path) -> str:
    """The output of a command that sees no checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), *words],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_is_the_wheels(python: Path, tmp_path: Path) -> None:
    assert str(python) != sys.executable
    code = "import fedtan_hpc; print(fedtan_hpc.__file__)"
    assert run(python, "-c", code, cwd=tmp_path).startswith(str(python.parents[1]))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_in_an_empty_folder(name: str, python: Path, tmp_path: Path) -> None:
    words, text = COMMANDS[name]
    assert text in run(python, "-m", *words, cwd=tmp_path)


@pytest.mark.slow
def test_a_comparison_is_run_listed_and_shown(python: Path, tmp_path: Path) -> None:
    words = ("methods=[fedavg]", "seeds=[0]", "rounds=1", "local_steps=1", "out=all")
    assert "| fedavg | 1 |" in run(python, "-m", "fedtan_hpc.compare", *words, cwd=tmp_path)
    assert (tmp_path / "all" / "compare.png").exists()
    run_dir = "all/runs/fedavg-seed0"
    runs = run(python, "-m", "fedtan_hpc.runs", "all", cwd=tmp_path).splitlines()
    assert runs[1].split()[:3] == [run_dir, "finished", "1"]
    summary = run(python, "-m", "fedtan_hpc.summarise_runs", run_dir, cwd=tmp_path)
    assert "| all runs | 1 |" in summary
    assert "| fedavg |" in run(python, "-m", "fedtan_hpc.overview", "all", cwd=tmp_path)


def test_the_printed_script_is_that_of_the_checkout(python: Path, tmp_path: Path) -> None:
    script = run(python, "-m", "fedtan_hpc.submit", "--script", cwd=tmp_path)
    assert script.startswith("#!/bin/bash\n")
    assert script == (commands.ROOT / "slurm" / "train.sbatch").read_text(encoding="utf-8")
