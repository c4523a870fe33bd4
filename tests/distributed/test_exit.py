"""The end of a program: no thread of a collective may need Python while Python ends.

Such a thread would be ended inside C++, which aborts the process ("terminate called without an
active exception").  Without its last line the loop below aborts so, with torch 2.13.  With it, it
did too: torch's first optimizer loads a module whose functions keep the process group for ever.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import commands

LOOP = """
import sys, time
import torch, torch.distributed as dist
import fedtan_hpc

class Slow:
    def __del__(self, sleep=time.sleep):  # Python takes long to end
        sleep(2)

slow = Slow()
model = fedtan_hpc.convert_batchnorm(torch.nn.BatchNorm1d(3))
dist.init_process_group("gloo")
torch.optim.SGD(model.parameters(), lr=0.1)
with fedtan_hpc.federated_statistics(model, 0.5):
    model(torch.randn(4, 3)).sum().backward()
fedtan_hpc.average_model(model, 0.5)
dist.barrier()
if dist.get_rank() == 1:
    time.sleep(1)
work = dist.all_reduce(torch.ones(3), async_op=True)
if dist.get_rank() == 1:
    work.wait()
work.get_future().then(lambda _: None)  # runs when the other rank comes
dist.destroy_process_group()
"""
JOB = """
from contextlib import suppress
from pathlib import Path

from fedtan_hpc.cli import main

main()
names = []
for each in Path("/proc/self/task").glob("*/comm"):
    with suppress(OSError):  # the thread has ended
        names.append(each.read_text())
assert names and not [name for name in names if "gloo" in name], names
"""


@pytest.mark.slow
def test_a_loop_that_destroys_its_process_group_ends_without_an_abort(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    done = commands.run("torchrun", "--nproc-per-node=2", "loop.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "terminate called" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks_per_client", [1, 2])
def test_a_job_leaves_no_thread_of_its_collectives(ranks_per_client: int, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    words = ("rounds=2", "local_steps=1", "clients=1", "partition=iid", "run_dir=run")
    clients = f"ranks_per_client={ranks_per_client}"
    done = commands.run("torchrun", "--nproc-per-node=2", "job.py", *words, clients, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
