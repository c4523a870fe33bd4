"""The interface through which a run reports its progress.

``rounds.jsonl``, TensorBoard, the display, checkpoints, the progress bars of the tools and a user's
own code are callbacks.  Loads without torch.
"""

from dataclasses import dataclass
from pathlib import Path

from ..config.schema import Config
from .records import RoundRecord, Summary


@dataclass(frozen=True)
class RunInfo:
    """The facts that a callback learns when a run begins."""

    config: Config
    run_dir: Path
    rounds_done: int
    """Rounds that were trained before an interruption; 0 for a new run."""


class RoundCallback:
    """Base class of callbacks; each method does nothing by default.

    Rank 0 calls ``run_began`` once, ``round_ended`` after each round, and ``run_ended`` at the end,
    while the other ranks wait.  After any failure, of a callback too, it calls ``run_failed``.
    An exception in a callback ends the run.  A run that was finished before calls nothing.
    """

    def run_began(self, run: RunInfo, /) -> None:
        """Set-up is done and round ``run.rounds_done + 1`` is about to start."""

    def round_ended(self, record: RoundRecord, /) -> None:
        """A round is over, and evaluated if that was due."""

    def run_ended(self, summary: Summary, /) -> None:
        """All rounds are done, and all files of the run are written."""

    def run_failed(self, error: BaseException, /) -> None:
        """The run ended early by ``error``, which may be a ``Stopped`` after a signal."""
