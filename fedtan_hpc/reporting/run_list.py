"""How the runs fare that were submitted: state, round, accuracy, and why a failed one failed.

python tools/jobs.py [FOLDER ...]

lists the runs in the given folders, or below them, and without any in runs/.  What is said comes
from the runs' own folders, so it stands when SLURM has forgotten the job; the queue is asked for
those that have not ended.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

_ASKING_SECONDS = 30.0
Queue: TypeAlias = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Row:
    """A submitted run as it stands."""

    run: str
    job: str
    state: str
    """finished, failed, stopped, gone, unknown, or the queue's word for it in lower case."""
    round: str
    accuracy: str
    """Of the last evaluation, in %."""
    why: str
    """Of a run that has ended before its time, or waits."""


def main(words: Sequence[str] | None = None) -> int:
    """Print the table."""
    words = sys.argv[1:] if words is None else words
    if any(word.startswith("-") for word in words):
        print(__doc__)
        return 0 if set(words) <= {"-h", "--help"} else 2
    if missing := [word for word in words if not Path(word).is_dir()]:
        print(f"jobs: {missing[0]}: allowed is the folder of a run, or of runs", file=sys.stderr)
        return 2
    folders = [Path(word) for word in words] or [Path("runs")]
    found = sorted({note.parent for each in folders for note in each.glob("**/submitted.json")})
    if not found:
        print(f"jobs: no submitted runs in {', '.join(map(str, folders))}", file=sys.stderr)
        return 1
    queue = in_queue() if any(not (run / "summary.json").exists() for run in found) else None
    show([row_of(run, queue) for run in found])
    return 0


def in_queue() -> Queue | None:
    """State and reason of this user's jobs in SLURM's queue, by number; None if it cannot tell."""
    if shutil.which("squeue") is None:
        return None
    words = ["squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%T|%r"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_ASKING_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        print(f"jobs: squeue: {str(said).strip()}", file=sys.stderr)
        return None
    rows = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {number: (state.lower(), reason) for number, state, reason in rows}


def row_of(run: Path, queue: Queue | None) -> Row:
    """What the folder of a run and the ``queue`` say."""
    note = _json(run / "submitted.json")
    records = list(_records(run / "rounds.jsonl"))
    state, why = _state(run, note, queue)
    accuracies = [r["test_accuracy"] for r in records if r.get("test_accuracy") is not None]
    return Row(
        run=str(run),
        job=str(note.get("job_id", "?")),
        state=state,
        round=str(records[-1]["round"]) if records else "0",
        accuracy=f"{100 * accuracies[-1]:.1f}" if accuracies else "",
        why=why,
    )


def _state(run: Path, note: dict[str, Any], queue: Queue | None) -> tuple[str, str]:
    if (run / "summary.json").exists():
        return "finished", ""
    failure = str(_json(run / "failure.json").get("message", ""))
    job = str(note.get("job_id"))
    if note.get("cluster") == "slurm" and queue is None:
        return "unknown", failure or "the queue does not answer"
    if note.get("cluster") == "slurm" and queue and job in queue:
        state, reason = queue[job]
        return state, failure or (reason if state == "pending" else "")
    if note.get("cluster") == "local" and _is_submitits(job):
        return "running", ""
    if failure:
        return ("stopped" if failure.startswith("stopped by") else "failed"), failure
    return "gone", _last_words(note)


def _is_submitits(process: str) -> bool:
    """Whether the process is one of submitit's, and not somebody's who has got its number."""
    path = Path("/proc") / process / "cmdline"
    return path.exists() and b"submitit" in path.read_bytes()


def _last_words(note: dict[str, Any]) -> str:
    """The end of what the job said, if it left no reason in its folder: it was killed, say."""
    for name in ("errors", "output"):
        path = Path(str(note.get(name)))
        if path.is_file() and (lines := path.read_text(errors="replace").split("\n")):
            said = [line.strip() for line in lines if line.strip()]
            if said:
                return f"{said[-1]} ({path})"
    return "it left no word; cancelled before it began?"


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:  # being written
            return


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def show(rows: Sequence[Row]) -> None:
    """A table; on a terminal as wide as that, else as wide as it needs."""
    table = Table("run", "job", "state", "round", "accuracy, %", "why", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row.run, row.job, row.state, row.round, row.accuracy, row.why)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 80 + max(len(row.run) + len(row.why) for row in rows)
    console.print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:
        os._exit(141)
