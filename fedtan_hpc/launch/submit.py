"""Submit the job, or every point of a sweep, to SLURM and return.

python slurm/submit.py launch.nodes=2 launch.tasks_per_node=4 launch.gpus_per_task=1 \
    launch.partition=gpu launch.timeout_min=240 algorithm=fedtan -m seed=0,1,2

prints the number and the folder of each job; ``tools/jobs.py`` shows how they fare.  The
environment that is active now is the jobs' too.
"""

from __future__ import annotations

import os
import sys
from functools import partial

sys.path.insert(1, os.getcwd())  # for networks of one's own, as in python -m fedtan_hpc

from .. import cli
from ..config.errors import ConfigError
from ..config.submit_options import SubmitConfig, check_launch
from ..config.validate import check


def main() -> None:
    """Check all options, submit, and print a line for each job."""
    with cli.exit_codes("submit"):
        configs = cli.compose_as(SubmitConfig, "submit")
        mistakes: dict[str, None] = {}
        for config in configs:
            for examine in (partial(check, config.job()), partial(check_launch, config.launch)):
                try:
                    examine()
                except ConfigError as error:
                    mistakes |= dict.fromkeys(error.mistakes)
        if mistakes:
            raise ConfigError(*mistakes)
        cli.check_folders(configs)
        from . import submitit_jobs  # loads submitit, after all that can go wrong without it

        for job in submitit_jobs.submit_all(configs):
            print(f"job {job.job_id}  run_dir {job.run_dir}")


if __name__ == "__main__":
    main()
