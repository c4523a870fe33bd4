"""The progress of runs that follow one another: a bar on a terminal, plain lines elsewhere.

Used by ``compare``.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich.progress

from ..config.errors import printable
from ..evaluation.callbacks import RoundCallback
from ..evaluation.loggers import console
from ..evaluation.records import RoundRecord, headline

_SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """Shows the progress of ``runs`` runs that will train ``rounds`` rounds, if ``shown``."""

    def __init__(self, runs: int, rounds: int, shown: bool) -> None:
        self._console = console(quiet=not shown)
        self.has_bar = shown and self._console.is_terminal
        self._runs, self._number = runs, 0
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        hidden = not self.has_bar
        self._bar = rich.progress.Progress(*columns, console=self._console, disable=hidden)
        self._task = self._bar.add_task("", total=rounds)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the bar inside the context; its last state stays on the terminal."""
        with self._bar:
            yield

    def follow(self, name: str, rounds: int, counted: bool) -> "Following":
        """Returns the callback of the next run; ``counted``: the bar waits for its rounds."""
        self._number += 1
        following = Following(self, f"run {self._number}/{self._runs}  {name}", rounds, counted)
        self._bar.update(self._task, description=following.name)
        return following

    def advance(self, description: str) -> None:
        """Counts a round."""
        self._bar.update(self._task, advance=1, description=description)

    def print(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def end(self, following: "Following", result: str) -> None:
        """Prints the result of a run; the bar no longer waits for its missing rounds."""
        self.print(f"{following.name}: {result}")
        total = self._bar.tasks[0].total or 0
        missing = following.expected - following.rounds_ended
        self._bar.update(self._task, total=total - missing)


class Following(RoundCallback):
    """Tells a ``Progress`` of the rounds of one run."""

    def __init__(self, progress: Progress, name: str, rounds: int, counted: bool) -> None:
        self._progress, self.name, self._rounds = progress, name, rounds
        self.expected = rounds if counted else 0
        """Rounds of this run that the bar waits for."""
        self.rounds_ended = 0
        self._result = ""
        self._last_line = time.monotonic()

    def round_ended(self, record: RoundRecord) -> None:
        """Advances the bar; without a terminal, prints a line each minute."""
        self.rounds_ended += 1
        if record.test_loss is not None:
            self._result = ", " + " ".join(headline(record, 1))
        text = f"{self.name}  round {record.round}/{self._rounds}{self._result}"
        self._progress.advance(text)
        is_late = time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES
        if is_late and not self._progress.has_bar:
            self._progress.print(text)
            self._last_line = time.monotonic()
