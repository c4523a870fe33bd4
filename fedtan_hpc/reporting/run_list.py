"""Lists runs, submitted or not: state, round, test result, and why a run ended early.

python -m fedtan_hpc.runs [FOLDER ...]

lists the runs in the given folders and below them; the default folder is runs/.  A run that nobody
submitted has no job number.  All that is shown comes from the folders of the runs, so it is there
when SLURM has forgotten the job; SLURM's queue adds the jobs that have not ended.

The states are finished, damaged (the result cannot be read), running, failed, stopped (by a
signal), gone (the process ended and left no message), unknown (SLURM's queue does not answer), and
the states of jobs in SLURM's queue, such as pending.  In a checkout ``python tools/jobs.py`` does
the same.
"""

import fcntl
import getpass
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from rich.table import Table

from ..config.errors import printable
from ..evaluation import saved_records
from ..evaluation.loggers import console
from ..files import reading
from ..files.reading import FileError
from ..job import run_dir
from .reports import Measure, finished

_SQUEUE_SECONDS = 30.0
_MOST_OF_A_CELL = 1000
"""Characters of a cell of the table."""
_RUN_FILES = {".lock", "rounds.jsonl", "summary.json", "failure.json"}
"""Files of which a run has at least one beside its config.yaml."""
Queue: TypeAlias = dict[str, tuple[str, str]]
"""State and reason of the jobs in SLURM's queue, by job number."""


class Row(NamedTuple):
    """A run as it is shown; ``result`` is the last evaluation's first metric."""

    run: str
    job: str
    state: str
    round: str
    result: str
    why: str


def main(words: Sequence[str] | None = None, program: str = "runs") -> int:
    """Prints the table; returns the exit code."""
    words = sys.argv[1:] if words is None else words
    if any(word.startswith("-") for word in words):
        print(__doc__)
        return 0 if set(words) <= {"-h", "--help"} else 2
    if missing := [word for word in words if not Path(word).is_dir()]:
        line = f"{program}: {missing[0]}: allowed is the folder of a run, or of runs"
        print(printable(line), file=sys.stderr)
        return 2
    folders = [Path(word) for word in words] or [Path("runs")]
    runs = sorted({run for folder in folders for run in run_folders(folder)})
    if not runs:
        print(printable(f"{program}: no runs in {', '.join(map(str, folders))}"), file=sys.stderr)
        return 1
    unfinished = [run for run in runs if not finished(run)]
    submitted = any((run / "submitted.json").exists() for run in unfinished)
    queue = in_queue(program) if submitted else None
    try:
        show([row_of(run, queue) for run in runs])
    except BrokenPipeError:  # as of a program whose output goes to head
        os._exit(141)
    return 0


def run_folders(folder: Path) -> Iterator[Path]:
    """Yields the folders of runs in ``folder`` and below it, but not what runs have set aside."""
    for name, below, files in os.walk(folder):
        submitted = "submitted.json" in files
        if submitted or ("config.yaml" in files and _RUN_FILES & set(files)):
            yield Path(name)
            below[:] = [each for each in below if not re.fullmatch(r"interrupted-\d+", each)]


def in_queue(program: str = "runs") -> Queue | None:
    """Asks SLURM for this user's jobs; None if it cannot tell."""
    if shutil.which("squeue") is None:
        return None
    words = ["squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%T|%r"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_SQUEUE_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        message = getattr(error, "stderr", None) or error
        print(printable(f"{program}: squeue: {str(message).strip()}"), file=sys.stderr)
        return None
    rows = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {number: (state.lower(), reason) for number, state, reason in rows}


def _is_evaluated(record: dict[str, Any]) -> bool:
    return any(record.get(name) is not None for name in ("test_accuracy", "test_loss"))


def _result(record: dict[str, Any]) -> str:
    """Returns name and value of the first test metric of an evaluated round."""
    measure = Measure.of_record(record)
    name, _, unit = measure.text.partition(", ")
    return f"{name} {measure.shown(record[measure.test]):.4g} {unit}".strip()


def row_of(run: Path, queue: Queue | None) -> Row:
    """Returns what the folder of a run and the ``queue`` say."""
    note = _json(run / "submitted.json")
    records, damage = _records(run)
    state, why = _state(run, note, queue)
    evaluated = [record for record in records if _is_evaluated(record)]
    job = note.get("job_id", "?")
    return Row(
        run=str(run),
        job=(str(job) if isinstance(job, str | int) else "?") if note else "",
        state=state,
        round=str(records[-1]["round"]) if records else "0",
        result=_result(evaluated[-1]) if evaluated else "",
        why=why or damage,
    )


def _state(run: Path, note: dict[str, Any], queue: Queue | None) -> tuple[str, str]:
    if finished(run):
        try:
            saved_records.finished(run)
        except (FileError, OSError) as error:
            return "damaged", str(error)
        return "finished", ""
    failure = run_dir.failure(run)
    job, cluster = str(note.get("job_id")), note.get("cluster")
    if cluster == "slurm" and queue is None:
        return "unknown", failure or "the queue does not answer"
    if cluster == "slurm" and queue and job in queue:
        state, reason = queue[job]
        return state, failure or (reason if state == "pending" else "")
    if cluster == "local" and _is_submitit(job):
        return "running", ""
    if failure:  # a run that goes on removes the file as soon as it has locked its folder
        return ("stopped" if failure.startswith("stopped by") else "failed"), failure
    if _is_locked(run / ".lock"):
        return "running", ""
    return "gone", _last_words(note) if note else "no message; the process may have been killed"


def _is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a run.

    This takes a shared lock without waiting, and releases it at once.  A run that begins in this
    moment asks for its lock again (``job.run_dir``).
    """
    try:
        with reading.opened(path) as lock:
            return not _takes(lock)
    except (FileError, OSError):  # there is no lock, or it cannot be read
        return False


def _takes(lock: BinaryIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        pass
    return True


def _is_submitit(process: str) -> bool:
    """Whether the process runs submitit; another program may have got its number since."""
    path = Path("/proc") / process / "cmdline"
    try:
        return process.isdecimal() and b"submitit" in reading.read_bytes(path)
    except (FileError, OSError):
        return False


def _last_words(note: dict[str, Any]) -> str:
    """The last line of the logs of a job that left no reason in its folder."""
    for name in ("errors", "output"):
        path = Path(str(note.get(name)))
        with suppress(FileError, OSError):
            if line := reading.last_line(path):
                return f"{line} ({path})"
    return "no message; the job may have been cancelled before it began"


def _records(run: Path) -> tuple[list[dict[str, Any]], str]:
    """Returns the records of a run until the first damaged line, and what is wrong with that."""
    records: list[dict[str, Any]] = []
    try:
        records += (record.line() for record in saved_records.rounds(run))
    except (FileError, OSError) as error:
        return records, str(error)
    return records, ""


def _json(path: Path) -> dict[str, Any]:
    try:
        return reading.read_json_object(path)
    except (FileError, OSError):
        return {}


def show(rows: Sequence[Row]) -> None:
    """Prints a table, as wide as the terminal; elsewhere as wide as the table needs."""
    table = Table("run", "job", "state", "round", "test", "why", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(printable(cell, _MOST_OF_A_CELL) for cell in row))
    shown = console(highlight=False, markup=False)
    if not shown.is_terminal:
        shown.width = 80 + max(len(printable(row.run) + printable(row.why)) for row in rows)
    with shown.capture() as text:  # console.print would hide a closed pipe
        shown.print(table)
    print(text.get(), end="", flush=True)
