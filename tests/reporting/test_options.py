"""Words of the tools: a network may lie in the current folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import commands

PROGRAM = """
import sys
from importlib.util import find_spec
from fedtan_hpc.launch import submit
from fedtan_hpc.reporting import compare, options

assert find_spec("my_network") is None, "an import has changed the path"
sys.argv = ["submit", "--cfg", "job"]
{call}
assert find_spec("my_network")
"""


@pytest.mark.parametrize("call", ["options.composed([])", "submit.main()"])
def test_the_current_folder_is_importable_once_a_job_is_composed(call: str, tmp_path: Path) -> None:
    """Python puts the folder of a program first, and not the current folder."""
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "tool.py").write_text(PROGRAM.format(call=call))
    (tmp_path / "my_network.py").touch()
    done = subprocess.run(
        [sys.executable, str(tmp_path / "tool" / "tool.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(commands.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
