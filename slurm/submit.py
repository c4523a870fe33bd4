"""Submit the job, or every point of a sweep, to SLURM and return.

python slurm/submit.py launch.nodes=2 launch.tasks_per_node=4 launch.gpus_per_task=1 \
    launch.partition=gpu launch.timeout_min=240 algorithm=fedtan -m seed=0,1,2

prints the number and the folder of each job; ``tools/jobs.py`` shows how they fare.  The
environment that is active now is the jobs' too.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(1, os.getcwd())  # for networks of one's own, as in python -m fedtan_hpc

from fedtan_hpc import cli
from fedtan_hpc.checks import check
from fedtan_hpc.errors import ConfigError
from fedtan_hpc.launch import SubmitConfig, check_launch


def main() -> None:
    """Check all options, submit, and print a line for each job."""
    with cli.exit_codes("submit"):
        configs = cli.compose_as(SubmitConfig, "submit")
        mistakes: dict[str, None] = {}
        for config in configs:
            for examine in (lambda c: check(c.job()), lambda c: check_launch(c.launch)):
                try:
                    examine(config)
                except ConfigError as error:
                    mistakes |= dict.fromkeys(error.mistakes)
        if mistakes:
            raise ConfigError(*mistakes)
        cli.check_folders(configs)
        from fedtan_hpc import submission  # loads submitit, after all that can go wrong without it

        for job in submission.submit_all(configs):
            print(f"job {job.job_id}  run_dir {job.run_dir}")


if __name__ == "__main__":
    main()
