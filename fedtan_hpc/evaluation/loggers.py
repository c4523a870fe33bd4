"""Callbacks of rank 0: ``rounds.jsonl``, ``probe.jsonl`` and the display.

The display is a progress bar on a terminal, plain lines elsewhere, and a table at the end.
"""

import json
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from ..config.errors import printable
from ..files import atomic_files
from ..runtime import launcher_env
from . import probe_records
from .callbacks import RoundCallback, RunInfo
from .probe_records import ProbeRecord
from .records import RoundRecord, Summary, headline, over_clients

_SECONDS_BETWEEN_LINES = 60.0
"""Time after which a line is printed for a round that is not evaluated."""


class RoundsFile(RoundCallback):
    """Appends one line a round to ``rounds.jsonl``."""

    def run_began(self, run: RunInfo) -> None:
        """Learns the folder."""
        self._path = run.run_dir / "rounds.jsonl"

    def round_ended(self, record: RoundRecord) -> None:
        """Writes the line."""
        line = json.dumps(record.line(), allow_nan=False) + "\n"
        atomic_files.append_text(self._path, line)


class ProbeFile(RoundCallback):
    """Appends one line a probed round to ``probe.jsonl``."""

    def run_began(self, run: RunInfo) -> None:
        """Learns the folder."""
        self._path = run.run_dir / probe_records.NAME

    def round_probed(self, record: ProbeRecord) -> None:
        """Writes the line."""
        atomic_files.append_text(self._path, probe_records.line_of(record))


class Display(RoundCallback):
    """Shows the progress and the result of a run on standard output."""

    def __init__(self) -> None:
        self._console = console()
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._rounds = 0
        self._result = ""

    def run_began(self, run: RunInfo) -> None:
        """Starts the bar on a terminal."""
        self._rounds = run.config.rounds
        if self._console.is_terminal:
            columns = "round", MofNCompleteColumn(), BarColumn(), "{task.description}"
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("", total=self._rounds, completed=run.rounds_done)
            self._bar.start()

    def round_ended(self, record: RoundRecord) -> None:
        """Advances the bar; without a terminal, prints lines.

        There is a line for each evaluated round, and for another one if a minute has passed.
        """
        if record.test_loss is not None:
            self._result = "  " + " ".join(headline(record, 1))
        text = f"train loss {record.train_loss:.4f}{self._result}"
        if self._bar is not None:
            self._bar.update(self._task, completed=record.round, description=text)
        elif record.test_loss is not None or self._is_late():
            self._last_line = time.monotonic()
            number = f"{record.round:{len(str(self._rounds))}d}"
            seconds = f"{record.round_seconds:.3f} s/round"
            line = f"round {number}/{self._rounds}  {text}  {seconds}"
            print(printable(line), flush=True)

    def _is_late(self) -> bool:
        return time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES

    def run_ended(self, summary: Summary) -> None:
        """Stops the bar and shows the result."""
        self.run_failed(summary)
        show_result(summary)

    def run_failed(self, error: object) -> None:
        """Stops the bar."""
        if self._bar is not None:
            self._bar.stop()


def console(**options: Any) -> Console:
    """Returns a console of rich with ``options`` that draws and colours only where that is seen.

    rich itself would do so on any terminal, also on one that a launcher reads for a file.
    """
    return Console(force_terminal=launcher_env.writes_to_terminal(), **options)


def show_result(summary: Summary) -> None:
    """Prints the table of results."""
    table = Table(title="Result", show_header=False)
    name, value = headline(summary)
    rows = (
        ("algorithm", summary.algorithm),
        (name, value),
        *_rows_over_clients(summary),
        ("test loss", f"{summary.test_loss:.4f}"),
        ("rounds", f"{summary.rounds}"),
        *([("ended early", summary.stopped_early)] if summary.stopped_early else []),
        ("seconds", f"{summary.total_seconds:.1f}"),
        ("seconds a round, median", f"{summary.median_round_seconds:.4f}"),
        ("ranks, backend, device", f"{summary.world_size}, {summary.backend}, {summary.device}"),
        ("files", summary.run_dir),
    )
    for row in rows:
        table.add_row(*map(printable, row), style="bold" if row[0] == name else "")
    shown = console(markup=False)
    if not shown.is_terminal:  # so that no line breaks inside the path
        shown.width = 100 + len(printable(summary.run_dir))
    with shown.capture() as text:  # console.print would end the process if nobody reads it
        shown.print(table)
    print(text.get(), end="", flush=True)


def _rows_over_clients(summary: Summary) -> list[tuple[str, str]]:
    """Returns what the test metric is the mean of, and the metric on the clients' own data."""
    figures = over_clients(summary)
    if "own_mix_mean" not in figures:
        return []
    scale, unit = (100, " %") if summary.test_accuracy is not None else (1, "")
    shown = {name: f"{scale * value:.{2 if unit else 4}f}" for name, value in figures.items()}
    own = f"{shown['own_mix_mean']} ± {shown.get('own_mix_spread', '0')}{unit}"
    rows = [("on each client's own data", own)]
    if "test_spread" in shown:  # the clients have models of their own
        which = f"{summary.judged} ({summary.clients_judged}), ± {shown['test_spread']}{unit}"
        rows.insert(0, ("which is the", which))
    return rows
