"""The README is true: its commands and its example run, its options are those of config.py."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import options_table
from tests.helpers import commands

README = (commands.ROOT / "README.md").read_text(encoding="utf-8")
QUICK_START, REST = README.split("\n## Quick start\n")[1].split("\n## ", 1)


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def expanded(word: str, folder: Path) -> list[str]:
    """What a shell in ``folder`` makes of a pattern."""
    if "*" not in word:
        return [word]
    return [str(path.relative_to(folder)) for path in sorted(folder.glob(word))]


def test_quick_start_is_two_commands_of_one_line() -> None:
    found = blocks("sh", QUICK_START)
    assert len(found) == 2
    assert all(block.count("\n") == 1 for block in found)
    assert "torchrun --nproc-per-node 5 -m fedtan_hpc" in found[0]
    assert "'.[test]'" in found[1]
    assert "pytest" in found[1]


def test_options_table_is_made_from_config() -> None:
    assert "\n".join(options_table.rows()) in README


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_commands_run(tmp_path: Path) -> None:
    """All in the given order in one folder; jobs do one round, later ones see earlier runs."""
    (tmp_path / "tools").symlink_to(commands.ROOT / "tools")
    (tmp_path / "docs").mkdir()
    lines = [line for block in blocks("sh", REST) for line in block.splitlines()]
    assert len(lines) >= 5
    for line in lines:
        line = line.replace("seed=0,1,2,3,4", "seed=0,1")  # a sweep, but a short one
        words = [part for word in shlex.split(line) for part in expanded(word, tmp_path)]
        if "fedtan_hpc" in words:
            words += ["rounds=1", "local_steps=1"]
        if "tools/compare.py" in words:
            words += ["rounds=1"]
        if "tools/bench_cohort.py" in words:
            words += ["--clients", "2", "--repeats", "1", "--batch-size", "2", "--local-steps", "2"]
        done = commands.forked(*words, cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "docs" / "digits_shards.png").stat().st_size > 10_000


@pytest.mark.parametrize("number", [0, 1])
def test_training_loops_of_ones_own_run(number: int, tmp_path: Path) -> None:
    example = blocks("python", REST)[number]
    (tmp_path / "own_loop.py").write_text(example, encoding="utf-8")
    done = commands.forked("torchrun", "--nproc-per-node", "2", "own_loop.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loss = float(done.stdout.split()[-1])
    assert loss < 0.6


def test_nothing_waits_to_be_filled_in() -> None:
    assert "@@" not in README


def test_version_stands_in_one_place() -> None:
    import fedtan_hpc

    text = (commands.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in text
    assert f"- {fedtan_hpc.__version__}:" in README
