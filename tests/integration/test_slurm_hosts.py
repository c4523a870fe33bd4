"""Jobs under a real SLURM whose two nodes are hosts with addresses of their own; needs root.

``tools/two_hosts.sh`` makes the hosts and ``tools/dev_slurm.sh`` starts the cluster;
``pytest -n 0 -m slurm`` runs the tests.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import commands, slurm_user
from tests.helpers.jobs import state_of
from tests.helpers.rounds import distance
from tests.helpers.slurm_user import Slurm, rounds_of, same_models, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

TWO_HOSTS = str(commands.ROOT / "tools" / "two_hosts.sh")
A_NODE_EACH = ("--nodes=2", "--ntasks-per-node=1")
JOB = ("clients=2", "rounds=400", "local_steps=1", "checkpoint.every=10", "run_dir=run")


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    started = subprocess.run([TWO_HOSTS, "start"], capture_output=True, text=True, check=False)
    if started.returncode == 2:
        pytest.skip(f"no two hosts here: {started.stderr.strip()}")
    assert started.returncode == 0, started.stderr
    try:
        with slurm_user.running("two_hosts") as environment:
            yield Slurm(environment, tmp_path, (TWO_HOSTS, "exec", "0"))
            link("up")
    finally:
        subprocess.run([TWO_HOSTS, "stop"], capture_output=True, check=True)


def link(state: str) -> None:
    subprocess.run([TWO_HOSTS, "link", state], check=True)


def test_a_client_on_the_ranks_of_a_node_or_of_two(slurm: Slurm, tmp_path: Path) -> None:
    """Both end as a single process does; rank 0 says which nodes hold one client together."""
    words = ("clients=2", "rounds=3", "precision=float64", "model=mlp")
    shared = (*words, "ranks_per_client=2")
    spread = "ranks_per_client=2: ranks 0 to 1, which hold one client, are on the nodes th-a, th-b"
    together = slurm.sbatch("--nodes=2", "--ntasks-per-node=2", *shared, "run_dir=node")
    assert slurm.ended(together)["JobState"] == "COMPLETED", slurm.said()
    assert "launcher srun, nodes 2, ranks 4" in slurm.said()
    assert "hold one client" not in slurm.said()
    apart = slurm.sbatch(*A_NODE_EACH, *shared, "run_dir=nodes")
    assert slurm.ended(apart)["JobState"] == "COMPLETED", slurm.said()
    assert spread in slurm.said()
    done = commands.run("python", "-m", "fedtan_hpc", *words, "run_dir=single", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    single = state_of(tmp_path / "single")
    for name in ("node", "nodes"):
        assert distance(state_of(tmp_path / name), single) < 1e-10


def test_a_cut_link_ends_a_job_over_two_hosts_and_it_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    """The model equals that of an undisturbed run on one host to the bit."""
    first = slurm.sbatch(*A_NODE_EACH, *JOB, "comm.timeout_seconds=8")
    slurm.wait_for_round(30)
    link("down")
    wait_until(lambda: "rank 1 hangs" in slurm.said() or "do not reach" in slurm.said(), 12)
    link("up")  # without it SLURM learns of the end when it gives the node up
    assert slurm.ended(first, 100)["JobState"] == "FAILED", slurm.said()
    assert not (tmp_path / "run" / "model.pt").exists()
    again = slurm.sbatch(*A_NODE_EACH, *JOB, "comm.timeout_seconds=8")
    assert slurm.ended(again)["JobState"] == "COMPLETED", slurm.said()
    assert "launcher srun, nodes 2, ranks 2" in slurm.said()
    assert rounds_of(tmp_path / "run") == list(range(1, 401))
    (tmp_path / "one").mkdir()
    done = commands.ranks(2, *JOB, cwd=tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert same_models(tmp_path / "run", tmp_path / "one" / "run")
