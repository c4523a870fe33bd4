"""Submits the job, or every point of a sweep, to SLURM and returns.

python -m fedtan_hpc.submit launch.nodes=2 launch.tasks_per_node=4 launch.gpus_per_task=1 \
    launch.partition=gpu launch.timeout_min=240 algorithm=fedtan -m seed=0,1,2

prints the number and the folder of each job; ``python -m fedtan_hpc.runs`` lists how they get on.
A job has the environment that is active at submission.  ``--script`` prints train.sbatch, for
``sbatch`` by hand.
"""

import sys
from functools import partial

from .. import cli
from ..config.errors import check_together, printable
from ..config.submit_options import SubmitConfig, check_launch
from ..config.validate import check
from . import requeue


def main() -> None:
    """Checks all options, submits the jobs, and prints a line for each."""
    with cli.exit_codes("submit"):
        if sys.argv[1:] == ["--script"]:
            print(requeue.script(), end="")
            return
        cli.import_from_current_folder()
        configs = cli.compose_as(SubmitConfig, "submit")
        if not configs:  # a flag such as --cfg, with which hydra only shows something
            return
        jobs = (partial(check, config.job()) for config in configs)
        launches = (
            partial(check_launch, config.launch, config.ranks_per_client) for config in configs
        )
        check_together([*jobs, *launches])
        cli.check_folders(configs)
        from . import submitit_jobs  # loads submitit, after everything that can fail without it

        for job in submitit_jobs.submit_all(configs):
            print(printable(f"job {job.job_id}  run_dir {job.run_dir}"))
