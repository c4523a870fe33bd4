"""What a tool shows of runs that follow one another: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console

from ..evaluation.records import RoundCallback, RoundRecord

_SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """Follows ``runs`` runs with ``rounds`` rounds to come; rank 0's is shown."""

    def __init__(self, runs: int, rounds: int, shown: bool) -> None:
        self._console = Console(quiet=not shown)
        self.lively = shown and self._console.is_terminal
        self._runs, self._number = runs, 0
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        self._bar = rich.progress.Progress(*columns, console=self._console, disable=not self.lively)
        self._task = self._bar.add_task("", total=rounds)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The bar is there inside, and stays as it then is."""
        with self._bar:
            yield

    def follow(self, name: str, rounds: int, to_come: bool) -> Following:
        """The log of the next run; ``to_come``: its rounds are among those to come."""
        self._number += 1
        following = Following(self, f"run {self._number}/{self._runs}  {name}", rounds)
        following.expected = rounds if to_come else 0
        self._bar.update(self._task, description=following.name)
        return following

    def move(self, description: str) -> None:
        """A round is done."""
        self._bar.update(self._task, advance=1, description=description)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def end(self, following: Following, outcome: str) -> None:
        """A run is over; rounds that did not come are no longer waited for."""
        self.say(f"{following.name}: {outcome}")
        total = self._bar.tasks[0].total or 0
        self._bar.update(self._task, total=total + following.told - following.expected)


class Following(RoundCallback):
    """Follows one run for a ``Progress``."""

    def __init__(self, progress: Progress, name: str, rounds: int) -> None:
        self._progress = progress
        self.name = name
        self._rounds = rounds
        self.expected = 0
        """Rounds of this run that the bar waits for."""
        self.told = 0
        """Rounds that were."""
        self._accuracy = ""
        self._spoken = time.monotonic()

    def round(self, record: RoundRecord) -> None:
        """Move on; without a terminal, a line a minute."""
        self.told += 1
        if record.test_accuracy is not None:
            self._accuracy = f", accuracy {100 * record.test_accuracy:.1f} %"
        text = f"{self.name}  round {record.round}/{self._rounds}{self._accuracy}"
        self._progress.move(text)
        late = time.monotonic() - self._spoken > _SECONDS_BETWEEN_LINES
        if late and not self._progress.lively:
            self._progress.say(text)
            self._spoken = time.monotonic()
