"""The shell lines around a submitted job's srun that have SLURM run the job again.

A run that is asked to stop, by preemption or before its time limit, ends saved, with 128 and the
signal's number; one of which a rank was killed or crashed ends with that rank's.  Either goes on
from its last checkpoint.  The script decides that, not a rank: it is still there when a rank is
lost before the ranks have met.  Ranks that wait in vain for one that has failed are killed by srun,
which looks the same; so a rank that says why it fails leaves a file too.
"""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from pathlib import Path

MOST_RESTARTS = 20
"""Runs of a job, for whatever reason it was run again, after which a lost rank ends it."""
_SAID = "FEDTAN_HPC_SAID"


def before(folder: Path) -> list[str]:
    """Lines before srun; ``folder`` is that of the job's logs, which all nodes see."""
    return f"""\
# A preempted job's ranks are told alone: a TERM that this script has too is a scancel.
cancelled=''; trap 'cancelled=yes' TERM
trap : USR1 # the ranks' own, if it is sent to all
export {_SAID}={shlex.quote(str(_named(folder)))}/$SLURM_JOB_ID.said; rm -f "${_SAID}"
""".splitlines()


def _named(folder: Path) -> Path:
    """The part of ``folder`` that does not wait for a job's number (``%j``)."""
    path = folder.expanduser().absolute()
    return next(each for each in (path, *path.parents) if "%" not in str(each))


AFTER = f"""\
code=$? again=''
case $code in
    138|140|143) again=yes ;; # saved because of USR1, USR2 (before the time limit), TERM
    134|135|137|139) # a rank is lost (253: for want of memory, which it would want again)
        [[ -e ${_SAID} ]] || ((${{SLURM_RESTART_COUNT:-0}} >= {MOST_RESTARTS})) || again=yes ;;
esac
job=$SLURM_JOB_ID # of an array's last task it is the whole array's too
[[ -z ${{SLURM_ARRAY_JOB_ID-}} ]] || job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
if [[ -n $again && -z $cancelled ]]; then
    # An exit code of our own could be taken for that of the next try: SLURM ends this script.
    scontrol requeue "$job" && sleep 60
fi
exit "$code"
""".splitlines()


def has_said() -> None:
    """Leave word for the script that this rank has said why it fails: another try would too."""
    if path := os.environ.get(_SAID):
        with suppress(OSError):  # a full disk must not hide why the rank fails
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()
