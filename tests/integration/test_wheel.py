"""An installed wheel offers all commands in any folder: conf/ and train.sbatch travel in it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers import commands

SMALL = ("rounds=1", "local_steps=1", "batch_size=16")
COMMANDS = {
    "fedtan_hpc": ("fedtan_hpc", *SMALL, "run_dir=run"),
    "compare": ("fedtan_hpc.compare", "methods=[fedavg]", "seeds=[0]", *SMALL, "out=comparison"),
    "overview": ("fedtan_hpc.overview", "--help"),
    "runs": ("fedtan_hpc.runs", "--help"),
    "show_partition": ("fedtan_hpc.show_partition", "out=partition.png"),
    "summarise_runs": ("fedtan_hpc.summarise_runs", "--help"),
    "submit": ("fedtan_hpc.submit", "launch=debug", *SMALL, "run_dir=run"),
    "submit --script": ("fedtan_hpc.submit", "--script"),
    "submit --help": ("fedtan_hpc.submit", "--help"),
}
PRINTED = {
    "fedtan_hpc": "test accuracy",
    "compare": "| fedavg | 1 |",
    "overview": "python -m fedtan_hpc.overview",
    "runs": "python -m fedtan_hpc.runs",
    "show_partition": "picture: partition.png",
    "summarise_runs": "python -m fedtan_hpc.summarise_runs",
    "submit": "test accuracy",
    "submit --script": "#SBATCH --requeue",
    "submit --help": "launch.tasks_per_node",
}


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


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_in_an_empty_folder(name: str, python: Path, tmp_path: Path) -> None:
    assert PRINTED[name] in run(python, "-m", *COMMANDS[name], cwd=tmp_path)


def test_runs_that_a_wheel_has_made_are_listed_and_compared(python: Path, tmp_path: Path) -> None:
    run(python, "-m", *COMMANDS["compare"], cwd=tmp_path)
    run_dir = "comparison/runs/fedavg-seed0"
    assert f"{run_dir}  " in run(python, "-m", "fedtan_hpc.runs", "comparison", cwd=tmp_path)
    assert "| all runs | 1 |" in run(
        python, "-m", "fedtan_hpc.summarise_runs", run_dir, cwd=tmp_path
    )
    assert "| fedavg |" in run(python, "-m", "fedtan_hpc.overview", "comparison", cwd=tmp_path)


def test_the_printed_script_is_that_of_the_checkout(python: Path, tmp_path: Path) -> None:
    script = run(python, "-m", "fedtan_hpc.submit", "--script", cwd=tmp_path)
    assert script.startswith("#!/bin/bash\n")
    assert script == (commands.ROOT / "slurm" / "train.sbatch").read_text(encoding="utf-8")
