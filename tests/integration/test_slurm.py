"""Jobs under a real SLURM with two nodes on this machine, which ``tools/dev_slurm.sh`` starts.

The tests submit with sbatch and with submitit: arrays, preemption, time limits, cancelled jobs, and
lost ranks.  Most tests take about ten seconds; ``pytest -n 0 -m slurm`` runs them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import commands, documents, slurm_user
from tests.helpers.ranks import MPI_VARIABLES
from tests.helpers.slurm_user import SUBMIT, Slurm, rounds_of, same_models, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

SHORT = ("clients=4", "local_steps=1", "rounds=20", "checkpoint.every=5")
LONG = ("clients=4", "local_steps=1", "rounds=400", "checkpoint.every=10")
"""About twenty seconds of rounds, so that a test can disturb the run."""
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")
SUBMIT_TWO_BY_TWO = ("launch.nodes=2", "launch.tasks_per_node=2", "launch.timeout_min=5")
Undisturbed = dict[tuple[str, ...], Path]
"""Folders of runs that nothing disturbed, by their options."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment variables with which sbatch reaches the cluster."""
    with slurm_user.running() as environment:
        yield environment


@pytest.fixture
def slurm(cluster: dict[str, str], tmp_path: Path) -> Iterator[Slurm]:
    """A user of the cluster in the folder of the test; the end cancels the jobs that are left."""
    user = Slurm(cluster, tmp_path)
    yield user
    for job in user.jobs:
        user.call("scancel", job, check=False)
    wait_until(lambda: not user.call("squeue", "-h"), 60)


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Runs of torchrun on four ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found: Undisturbed = {}
    for name, options in (("short", SHORT), ("long", LONG)):
        done = commands.ranks(4, *options, f"run_dir={name}", cwd=folder)
        assert done.returncode == 0, done.stderr
        found[options] = folder / name
    return found


def test_sbatch_over_two_nodes_equals_torchrun(slurm: Slurm, undisturbed: Undisturbed) -> None:
    """The models are equal to the bit.

    The environment has no address, and the names of the nodes do not resolve.
    """
    job = slurm.sbatch(*TWO_BY_TWO, *SHORT, "run_dir=run")
    assert slurm.ended(job)["JobState"] == "COMPLETED", slurm.said()
    assert "launcher srun, nodes 2, ranks 4, backend gloo" in slurm.said()
    assert same_models(slurm.folder / "run", undisturbed[SHORT])


def test_submitit_over_two_nodes_equals_torchrun(slurm: Slurm, undisturbed: Undisturbed) -> None:
    [job] = slurm.submit(*SUBMIT_TWO_BY_TWO, *SHORT, "run_dir=run")
    assert slurm.ended(job)["JobState"] == "COMPLETED", slurm.said()
    assert same_models(slurm.folder / "run", undisturbed[SHORT])
    table = slurm.call(sys.executable, str(commands.ROOT / "tools" / "jobs.py"), ".")
    assert f"run  {job}" in " ".join(table.split("\n")[1].split()).replace(" ", "  ", 1)
    assert "finished" in table


def test_a_sweep_is_an_array_with_a_folder_for_each_point(slurm: Slurm) -> None:
    jobs = slurm.submit("launch.tasks_per_node=2", *SHORT, "-m", "seed=0,1")
    assert [job.partition("_")[2] for job in jobs] == ["0", "1"]
    for job in jobs:
        assert slurm.ended(job)["JobState"] == "COMPLETED", slurm.said()
    seeds = {path.parent.name.split("-seed")[1][0] for path in slurm.folder.glob("runs/*/model.pt")}
    assert seeds == {"0", "1"}


def test_more_threads_than_the_task_has_cpus_is_a_mistake(slurm: Slurm) -> None:
    job = slurm.sbatch("--ntasks=2", "--cpus-per-task=1", *SHORT, "threads=2", "run_dir=run")
    facts = slurm.ended(job)
    assert facts["ExitCode"] == "2:0", slurm.said()
    assert slurm.said().count("fedtan_hpc: threads=2: allowed is 1 to 1") == 1
    assert "--cpus-per-task" in slurm.said()


def test_threads_are_the_cpus_of_the_task(slurm: Slurm) -> None:
    job = slurm.sbatch("--ntasks=1", "--cpus-per-task=2", *SHORT, "run_dir=run")
    assert slurm.ended(job)["JobState"] == "COMPLETED", slurm.said()
    assert "threads per rank 2" in slurm.said()


def test_what_the_cluster_refuses_is_told_in_its_words(slurm: Slurm) -> None:
    done = subprocess.run(
        [sys.executable, SUBMIT, "launch.partition=nowhere", *SHORT],
        cwd=slurm.folder,
        env=slurm.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]  # the lines of sbatch stand before it
    assert line.startswith("submit: launch.cluster=slurm refuses the job: ")
    assert "partition" in line


def save_and_requeue(slurm: Slurm, job: str) -> None:
    slurm.call("scancel", "--signal=USR1", "--batch", job)


def requeue(slurm: Slurm, job: str) -> None:
    slurm.call("scontrol", "requeue", job)


def usr2(slurm: Slurm, job: str) -> None:
    """SLURM sends this signal to a job of submitit before the time limit."""
    slurm.call("scancel", "--signal=USR2", job)


@pytest.mark.parametrize("disturb", [save_and_requeue, requeue])
def test_sbatch_goes_on_after(
    disturb: Callable[[Slurm, str], None], slurm: Slurm, undisturbed: Undisturbed
) -> None:
    job = slurm.sbatch(*TWO_BY_TWO, *LONG, "run_dir=run")
    check_it_goes_on(slurm, job, disturb, undisturbed)


@pytest.mark.parametrize("disturb", [usr2, requeue])
def test_submitit_goes_on_after(
    disturb: Callable[[Slurm, str], None], slurm: Slurm, undisturbed: Undisturbed
) -> None:
    [job] = slurm.submit(*SUBMIT_TWO_BY_TWO, *LONG, "run_dir=run")
    check_it_goes_on(slurm, job, disturb, undisturbed)


def check_it_goes_on(
    slurm: Slurm, job: str, disturb: Callable[[Slurm, str], None], undisturbed: Undisturbed
) -> None:
    """The run has every round once, and its model equals that of an undisturbed run to the bit."""
    slurm.wait_for_round(30)
    disturb(slurm, job)
    facts = slurm.ended(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), slurm.said()
    [resumed] = summary_of(slurm.folder / "run")["resumed_after"]
    assert 0 < resumed < 400
    assert rounds_of(slurm.folder / "run") == list(range(1, 401))
    assert same_models(slurm.folder / "run", undisturbed[LONG])


def test_a_cancelled_job_is_saved_and_stays_cancelled(slurm: Slurm) -> None:
    job = slurm.sbatch(*TWO_BY_TWO, *LONG, "run_dir=run")
    slurm.wait_for_round(20)
    slurm.call("scancel", job)
    facts = slurm.ended(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), slurm.said()
    assert "stopped by SIGTERM after round" in slurm.said()
    last = rounds_of(slurm.folder / "run")[-1]
    assert (slurm.folder / "run" / "checkpoints" / f"round-{last:06d}.pt").exists()


def test_a_cancelled_submitted_job_stays_cancelled(slurm: Slurm) -> None:
    [job] = slurm.submit(*SUBMIT_TWO_BY_TWO, *LONG, "run_dir=run")
    slurm.wait_for_round(20)
    slurm.call("scancel", job)
    facts = slurm.ended(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), slurm.said()
    table = slurm.call(sys.executable, str(commands.ROOT / "tools" / "jobs.py"), ".")
    assert "stopped by SIGTERM after round" in table


@pytest.mark.parametrize("way", ["sbatch", "submitit"])
def test_a_preempted_job_goes_on(way: str, slurm: Slurm, undisturbed: Undisturbed) -> None:
    if way == "sbatch":
        job = slurm.sbatch(*TWO_BY_TWO, "--partition=preempt", *LONG, "run_dir=run")
    else:
        [job] = slurm.submit(*SUBMIT_TWO_BY_TWO, "launch.partition=preempt", *LONG, "run_dir=run")
    slurm.wait_for_round(20)
    urgent = slurm.sbatch(*TWO_BY_TWO, "--partition=main", *SHORT, "run_dir=urgent")
    assert slurm.ended(urgent)["JobState"] == "COMPLETED", slurm.said()
    facts = slurm.ended(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), slurm.said()
    assert "stopped by SIGTERM after round" in slurm.said()
    assert same_models(slurm.folder / "run", undisturbed[LONG])


@pytest.mark.parametrize("way", ["sbatch", "submitit"])
def test_a_time_limit_does_not_end_a_run(way: str, slurm: Slurm) -> None:
    """The shortest limit of SLURM is a minute; its signal comes half a minute before the end."""
    endless = ("clients=4", "local_steps=1", "rounds=100000", "eval_every=100000", "run_dir=run")
    if way == "sbatch":
        job = slurm.sbatch(*TWO_BY_TWO, "--time=1", "--signal=B:USR1@5", *endless)
    else:
        limits = ("launch.timeout_min=1", "launch.signal_delay_s=5")
        [job] = slurm.submit(*SUBMIT_TWO_BY_TWO, *limits, *endless)
    wait_until(lambda: slurm.facts(job)["Restarts"] == "1", 100)
    name = {"sbatch": "SIGUSR1", "submitit": "SIGUSR2"}[way]
    assert f"stopped by {name} after round" in slurm.said()
    before = rounds_of(slurm.folder / "run")
    assert (slurm.folder / "run" / "checkpoints" / f"round-{before[-1]:06d}.pt").exists()


def begun(way: str, slurm: Slurm, options: Sequence[str]) -> str:
    """The number of a job of two nodes with two ranks each."""
    if way == "sbatch":
        return slurm.sbatch(*TWO_BY_TWO, *options, "run_dir=run")
    return slurm.submit(*SUBMIT_TWO_BY_TWO, *options, "run_dir=run")[0]


@pytest.mark.parametrize("way", ["sbatch", "submitit"])
def test_a_rank_that_is_killed_costs_the_rounds_since_the_last_checkpoint(
    way: str, slurm: Slurm, undisturbed: Undisturbed
) -> None:
    job = begun(way, slurm, LONG)
    slurm.wait_for_round(25)
    kill(job, rank=2)
    assert slurm.ended(job)["JobState"] == "COMPLETED", slurm.said()
    assert summary_of(slurm.folder / "run")["resumed_after"]
    assert rounds_of(slurm.folder / "run") == list(range(1, 401))
    assert same_models(slurm.folder / "run", undisturbed[LONG])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", ["sbatch", "submitit"])
def test_a_rank_that_is_killed_in_start_up_costs_the_start(
    way: str, slurm: Slurm, undisturbed: Undisturbed
) -> None:
    """srun ends the other ranks, which wait for the lost one, a minute later."""
    job = begun(way, slurm, SHORT)
    kill(job, rank=2)
    assert slurm.ended(job, 200)["JobState"] == "COMPLETED", slurm.said()
    assert same_models(slurm.folder / "run", undisturbed[SHORT])


def recipes() -> list[str]:
    """The lines of the ``bash`` blocks of docs/cluster.md that a SLURM without GPUs can run."""
    page = (commands.ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    titles = ("Jobs with sbatch", "Jobs from Python", "Inside an allocation")
    sections = (page.split(f"\n## {title}\n")[1].split("\n## ")[0] for title in titles)
    blocks = (re.findall(r"```bash\n(.*?)```", section, re.DOTALL) for section in sections)
    return [line for found in blocks for block in found for line in block.splitlines()]


def test_there_are_recipes_for_every_way_to_start() -> None:
    starts = [line.split()[0] for line in recipes()]
    assert {"sbatch", "python", "srun", "torchrun", "mpirun"} == set(starts)
    assert len(starts) >= 9


@pytest.mark.timeout(900)
def test_the_recipes_run(slurm: Slurm) -> None:
    """Each line runs as it stands, with three rounds; all jobs complete."""
    for name in ("slurm", "tools"):
        (slurm.folder / name).symlink_to(commands.ROOT / name)
    slurm.environment.update(MPI_VARIABLES)
    for line in recipes():
        if "jobs.py" not in line:
            line = f"{documents.split_at_operator(line)[0]} rounds=3 local_steps=1"
        said = slurm.call("bash", "-ec", line)
        slurm.jobs += re.findall(r"job (\d+\S*)", said)
        for job in slurm.jobs:
            assert slurm.ended(job)["JobState"] == "COMPLETED", f"{line}\n{slurm.said()}"
        slurm.jobs.clear()
    assert len(list(slurm.folder.glob("runs/*/model.pt"))) >= 5


def kill(job: str, rank: int) -> None:
    """Kills a rank of the job as soon as it has a process."""
    wait_until(lambda: task_of(job, rank) is not None, 30)
    process = task_of(job, rank)
    assert process is not None
    os.kill(process, signal.SIGKILL)


def task_of(job: str, rank: int) -> int | None:
    """Finds the process of a rank by the variables that srun gave it."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = set(path.read_bytes().split(b"\0"))
        except OSError:
            continue
        step = any(variable.startswith(b"SLURM_STEP_NUM_TASKS=") for variable in variables)
        if wanted <= variables and step:
            return int(path.parent.name)
    return None
