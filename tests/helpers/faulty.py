"""The job with faults, each in one round of one rank.

    FAULTS="1:7:kill 0:9:TERM" FAULTS_FOLDER=... torchrun ... faulty.py overrides

A fault is RANK:ROUND:KIND.  It happens once, also if the job restarts: the folder has a file for
each that has happened.  Kinds: kill (SIGKILL), stop (SIGSTOP, as a machine that hangs), sleep (a
thread that never returns), error (an exception), exit and interrupt (SystemExit and
KeyboardInterrupt), and names of signals, which the rank sends to itself.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from fedtan_hpc.cli import main
from fedtan_hpc.distributed import process_group
from fedtan_hpc.training.cohort import Cohort

begin_round = Cohort.begin_round


def begin_round_with_faults(cohort: Cohort, context: Any) -> Any:
    for fault in os.environ.get("FAULTS", "").split():
        rank, number, kind = fault.split(":")
        if (process_group.rank(), context.number) == (int(rank), int(number)) and is_first(fault):
            happen(kind)
    return begin_round(cohort, context)


def is_first(fault: str) -> bool:
    mark = Path(os.environ["FAULTS_FOLDER"]) / fault.replace(":", "-")
    if mark.exists():
        return False
    mark.touch()
    return True


def happen(kind: str) -> None:
    if kind == "sleep":
        time.sleep(1000)
    elif kind == "error":
        raise ValueError("a bad day")
    elif kind == "exit":
        raise SystemExit(0)
    elif kind == "interrupt":
        raise KeyboardInterrupt("a key")
    else:
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(kind)
        os.kill(os.getpid(), number or getattr(signal, f"SIG{kind}"))


if __name__ == "__main__":
    Cohort.begin_round = begin_round_with_faults  # type: ignore
    main()
