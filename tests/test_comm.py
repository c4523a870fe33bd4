"""Starting and stopping the process group."""

from __future__ import annotations

from pathlib import Path

import commands

STARTS = 40
SCRIPT = f"""
import torch
from fedtan_hpc import comm, environment

info = environment.detect()
for start in range({STARTS}):
    comm.start(info.rank, info.world_size, "gloo", timeout_seconds=20.0)
    total = comm.sum_over_ranks(torch.tensor(float(start + info.rank)))
    assert total == 2 * start + 1, (start, total)
    comm.stop()
print("done", flush=True)
"""


def test_a_process_may_start_many_times(tmp_path: Path) -> None:
    """As a sweep does; a rank may be at its next start while the other still stops."""
    (tmp_path / "starts.py").write_text(SCRIPT, encoding="utf-8")
    done = commands.run("torchrun", "--nproc-per-node", "2", "starts.py", cwd=tmp_path, seconds=50)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2
