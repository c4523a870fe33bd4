"""The callback of rank 0 that writes ``best.pt``: the global model at the best evaluation."""

from collections.abc import Sequence

from torch import nn

from ..files import atomic_files
from .callbacks import RoundCallback, RunInfo
from .early_stopping import BestEvaluation
from .records import RoundRecord

NAME = "best.pt"


class BestModelFile(RoundCallback):
    """Writes the state_dict of ``model`` whenever an evaluation is better than all before.

    ``history`` are the rounds before an interruption.  If the model of the best of them is lost, so
    that there is no file, the first evaluation counts as the best.
    """

    def __init__(self, model: nn.Module, history: Sequence[RoundRecord] = ()) -> None:
        self._model, self._history = model, history

    def run_began(self, run: RunInfo) -> None:
        """Learns the folder and the options."""
        self._path = run.run_dir / NAME
        history = self._history if self._path.exists() else ()
        self._best = BestEvaluation(run.config.early_stopping, history)

    def round_ended(self, record: RoundRecord) -> None:
        """Writes the file if the round has the best evaluation."""
        if self._best.add(record):
            state = {key: value.cpu() for key, value in self._model.state_dict().items()}
            atomic_files.save(self._path, state)
