"""The interface through which a run reports its progress.

``rounds.jsonl``, TensorBoard, the display, checkpoints, the progress bars of the tools and a user's
own code are callbacks.  Loads without torch.
"""

from dataclasses import dataclass
from pathlib import Path

from ..config.schema import Config
from .probe_records import ProbeRecord
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

    Rank 0 calls ``run_began`` when set-up is done, ``round_ended`` after each round (before it
    ``round_probed``, if a probe was due), and
    ``run_ended`` at the end.  An exception in a callback ends the run.  After a failure of training
    or of a callback rank 0 calls ``run_failed`` of all callbacks, perhaps without ``run_began`` or
    after ``run_ended``.  A failure before, and a run that was finished before, call nothing.

    The other ranks do not wait until they need rank 0 in the next round.  If a call takes longer
    than ``comm.timeout_seconds``, they end the job as if rank 0 hung: a slow callback needs a
    higher value of that option.
    """

    def run_began(self, run: RunInfo, /) -> None:
        """Set-up is done and round ``run.rounds_done + 1`` is about to start."""

    def round_ended(self, record: RoundRecord, /) -> None:
        """A round is over, and evaluated if that was due."""

    def round_probed(self, record: ProbeRecord, /) -> None:
        """The probe has measured a round; ``round_ended`` follows."""

    def run_ended(self, summary: Summary, /) -> None:
        """All rounds are done, and all files of the run are written."""

    def run_failed(self, error: BaseException, /) -> None:
        """The run ended early by ``error``, which may be a ``Stopped`` after a signal."""
