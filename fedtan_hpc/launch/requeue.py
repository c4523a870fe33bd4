"""The batch script ``train.sbatch``, and its shell lines by which SLURM runs a job again.

The policy is the same for jobs of ``train.sbatch`` and of ``submitit_jobs``, and its lines stand
once, in the script between marks.  The script decides, not a rank: it is still there when a rank is
lost before the ranks have met.

- A run that a signal asked to stop has saved itself: the job is queued again, without a limit.
- A rank was killed or crashed: the job is queued again and goes on from its last checkpoint, unless
  it was queued again 20 times, for any reason, or a rank reported why it fails
  (``runtime.failure_file``).
- A job that ``scancel`` ends is not queued again.
"""

import shlex
from pathlib import Path


def script() -> str:
    """Returns the text of ``train.sbatch``: of slurm/ in a checkout, of this folder in a wheel."""
    here = Path(__file__).resolve().parent
    path = here / "train.sbatch"
    if not path.exists():
        path = here.parents[1] / "slurm" / "train.sbatch"
    return path.read_text(encoding="utf-8")


def setup_lines(folder: Path) -> list[str]:
    """Returns the lines before srun.

    ``folder`` is the folder of the job's logs, which all nodes see.  In the part of its name from
    the first ``%`` on SLURM puts in the number of the job, so only the folders above are used.
    """
    path = folder.expanduser().absolute()
    known = next(each for each in (path, *path.parents) if "%" not in str(each))
    return [f"failure_folder={shlex.quote(str(known))}", *_lines("requeue-setup")]


def teardown_lines() -> list[str]:
    """Returns the lines after srun, which end the script with srun's exit code."""
    return ["code=$?", *_lines("requeue-teardown")]


def _lines(mark: str) -> list[str]:
    _, _, rest = script().partition(f"# <{mark}>")
    lines, end, _ = rest.partition(f"# </{mark}>")
    assert end, f"train.sbatch lacks the mark {mark}"
    return lines.splitlines()[1:]
