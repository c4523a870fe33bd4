"""malloc keeps freed memory for the next step, unless the user has set malloc."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.helpers import commands

FAULTS = """
import ctypes, resource, sys, torch
from fedtan_hpc.runtime import malloc

def step():
    kept = [torch.ones(2**19) for _ in range(30)]  # 2 MiB each

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if "return" in sys.argv:  # return every block at once; by default glibc varies
    ctypes.CDLL(None).mallopt(-3, 4096)
if "keep" in sys.argv:
    malloc.keep_freed_memory()
for _ in range(5):
    step()
before = faults()
for _ in range(10):
    step()
print((faults() - before) / 10)
"""

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc"
)


def faults_of_a_step(folder: Path, *words: str) -> float:
    (folder / "faults.py").write_text(FAULTS)
    done = commands.run("python", "faults.py", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@needs_glibc
@pytest.mark.slow
def test_a_step_reuses_the_memory_that_the_last_one_freed(tmp_path: Path) -> None:
    """60 MiB are 15,360 pages of 4 KiB, or 30 of 2 MiB where the system uses huge pages."""
    returned = faults_of_a_step(tmp_path, "return")
    kept = faults_of_a_step(tmp_path, "return", "keep")
    assert returned > 20
    assert kept < returned / 10


@needs_glibc
def test_malloc_variables_of_the_user_have_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4096")
    assert faults_of_a_step(tmp_path, "keep") > 20
