"""What a run reports: one record a round, one summary at the end, and who writes them down."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class RoundRecord:
    """One line of ``rounds.jsonl``."""

    round: int
    """From 1."""
    train_loss: float
    """sum_k p_k times client k's mean loss over its local steps, before each step."""
    test_loss: float | None
    """Mean cross-entropy on the test set; null if the round was not evaluated."""
    test_accuracy: float | None
    """Share of right answers on the test set, 0 to 1; null if not evaluated."""
    learning_rate: float
    round_seconds: float
    """Wall time of local steps and average on rank 0; evaluation and checks are apart."""
    comm_messages: int
    """Collectives of BN statistics and model average on rank 0."""
    comm_bytes: int
    """Payload of those collectives that rank 0 put in, in bytes."""
    clients: int
    """Clients that took part."""


@dataclass(frozen=True)
class Summary:
    """``summary.json``: the result of a run and what it ran on."""

    algorithm: str
    rounds: int
    test_accuracy: float
    """Share of right answers of the final model on the test set, 0 to 1."""
    test_loss: float
    total_seconds: float
    """From the start of ``run`` to the final model, start-up and evaluation included."""
    startup_seconds: float
    """Of ``total_seconds``, those before the first round."""
    median_round_seconds: float
    peak_memory_bytes: int
    """Most memory of any rank's process; on a GPU, of the GPU's memory."""
    world_size: int
    backend: str
    """Carrier of the collectives; "none" in a single process."""
    device: str
    parameters: int
    """Trainable values of the model."""
    versions: dict[str, str]
    run_dir: str


class NullLog:
    """Writes nothing: for every rank but 0."""

    def round(self, record: RoundRecord) -> None:
        """Take note of a round."""

    def close(self) -> None:
        """Nothing more comes."""


class RunLog(NullLog):
    """Appends to ``rounds.jsonl`` and to TensorBoard's event file."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._lines = open(folder / "rounds.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(folder))

    def round(self, record: RoundRecord) -> None:
        """One line, written through at once, and one point on each curve."""
        values = asdict(record)
        self._lines.write(json.dumps(values, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if value is not None and name != "round":
                self._board.add_scalar(name, value, record.round)

    def close(self) -> None:
        """Flush and close both files."""
        self._lines.close()
        self._board.close()
