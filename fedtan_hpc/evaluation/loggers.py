"""What rank 0 shows: a progress bar on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .records import RoundCallback, RoundRecord, Summary


class Display(RoundCallback):
    """Follows the rounds of a run."""

    def __init__(self, rounds: int, behind: int = 0) -> None:
        self._rounds = rounds
        self._console = Console()
        self._bar: Progress | None = None
        self._accuracy = ""
        if self._console.is_terminal:
            columns = (
                TextColumn("round"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=rounds, completed=behind)
            self._bar.start()

    def round(self, record: RoundRecord) -> None:
        """Move the bar on; without a terminal, a line for each evaluation."""
        if record.test_accuracy is not None:
            self._accuracy = f"  test accuracy {100 * record.test_accuracy:.1f} %"
        text = f"train loss {record.train_loss:.4f}{self._accuracy}"
        if self._bar is not None:
            self._bar.update(self._task, completed=record.round, description=text)
        elif record.test_accuracy is not None:
            number = f"{record.round:{len(str(self._rounds))}d}"
            seconds = f"{record.round_seconds:.3f} s/round"
            print(f"round {number}/{self._rounds}  {text}  {seconds}", flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()


def show_result(summary: Summary) -> None:
    """The result table."""
    table = Table(title="Result", show_header=False)
    rows = (
        ("algorithm", summary.algorithm),
        ("test accuracy", f"{100 * summary.test_accuracy:.2f} %"),
        *_of_clients(summary),
        ("test loss", f"{summary.test_loss:.4f}"),
        ("rounds", f"{summary.rounds}"),
        ("seconds", f"{summary.total_seconds:.1f}"),
        ("seconds a round, median", f"{summary.median_round_seconds:.4f}"),
        ("ranks, backend, device", f"{summary.world_size}, {summary.backend}, {summary.device}"),
        ("files", summary.run_dir),
    )
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "test accuracy" else "")
    console = Console()
    if not console.is_terminal:
        console.width = 100 + len(summary.run_dir)  # a log has room for the whole path
    console.print(table)


def _of_clients(summary: Summary) -> list[tuple[str, str]]:
    """What the figures are of, if not of one global model."""
    if summary.clients_own_mix_accuracy_mean is None:
        return []
    spread = summary.clients_test_accuracy_spread or 0.0
    own, of_own = summary.clients_own_mix_accuracy_mean, summary.clients_own_mix_accuracy_spread
    return [
        ("is the", f"{summary.judged} ({summary.clients_judged}), ± {100 * spread:.2f}"),
        ("in own mix of labels", f"{100 * own:.2f} ± {100 * (of_own or 0.0):.2f} %"),
    ]


class RunLog(RoundCallback):
    """Appends to ``rounds.jsonl`` and to TensorBoard's event file."""

    def __init__(self, folder: Path, behind: int = 0) -> None:
        """Rounds until ``behind`` are there already; curves lose what came after them."""
        from torch.utils.tensorboard import SummaryWriter

        self._lines = open(folder / "rounds.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(folder), purge_step=behind + 1 if behind else None)

    def round(self, record: RoundRecord) -> None:
        """One line, written through at once, and one point on each curve."""
        values = asdict(record)
        self._lines.write(json.dumps(values, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if value is not None and name != "round":
                self._board.add_scalar(name, value, record.round)

    def close(self) -> None:
        """Flush and close both files; what they lost was told when it was written."""
        for each in (self._lines, self._board):
            with suppress(OSError):
                each.close()
