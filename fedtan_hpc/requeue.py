"""The shell lines around a submitted job's srun that have SLURM run the job again.

A run that is asked to stop, by preemption or before its time limit, ends saved, with 128 and the
signal's number; one of which a rank was killed or crashed ends with that rank's.  Either goes on
from its last checkpoint.  The script decides that, not a rank: it is still there when a rank is
lost before the ranks have met.
"""

from __future__ import annotations

MOST_RESTARTS = 20
"""Times that a job is run again of which a rank was lost."""

BEFORE = """\
# A preempted job's ranks are told alone: a TERM that this script has too is a scancel.
cancelled=''; trap 'cancelled=yes' TERM
""".splitlines()

AFTER = f"""\
code=$? again=''
case $code in
    138|140|143) again=yes ;; # saved because of USR1, USR2 (before the time limit), TERM
    134|135|137|139) # a rank is lost
        ((${{SLURM_RESTART_COUNT:-0}} >= {MOST_RESTARTS})) || again=yes ;;
esac
job=$SLURM_JOB_ID # of an array's last task it is the whole array's too
[[ -z ${{SLURM_ARRAY_JOB_ID-}} ]] || job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
if [[ -n $again && -z $cancelled ]]; then
    # An exit code of our own could be taken for that of the next try: SLURM ends this script.
    scontrol requeue "$job" && sleep 60
fi
exit "$code"
""".splitlines()
