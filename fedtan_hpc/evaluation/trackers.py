"""Trackers: callbacks of rank 0 that keep options and figures of a run where runs are compared.

TensorBoard, Weights & Biases, MLflow, and a file rounds.csv; ``job`` makes those of the option
``tracking.to``.
"""

import csv
import io
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..config.enums import TrackerName
from ..config.errors import Stopped
from ..config.schema import TrackingConfig, flat, to_dict
from ..files import atomic_files, reading
from ..files.typed_values import fits
from . import saved_records
from .callbacks import RoundCallback, RunInfo
from .probe_records import ProbeRecord
from .records import RoundRecord, Summary

_MOST_CLASSES = 20
"""A list with a figure for each class is drawn as curves up to this length."""
_IDS = "trackers.json"


def make(tracking: TrackingConfig) -> list[RoundCallback]:
    """Returns the trackers of the option ``tracking.to``, each once."""
    return [_KINDS[name]() for name in dict.fromkeys(tracking.to)]


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers in a line of rounds.jsonl, without the number of the round.

    A short list gives one number for each class: test_iou_0, test_iou_1 and so on.
    """
    named: dict[str, Any] = {}
    for name, value in line.items():
        if not isinstance(value, list):
            named[name] = value
        elif len(value) <= _MOST_CLASSES:
            named |= {f"{name}_{number}": each for number, each in enumerate(value)}
    return {k: v for k, v in named.items() if isinstance(v, int | float) and k != "round"}


class Tracker(RoundCallback, ABC):
    """Base class of trackers that take named numbers by round."""

    _is_open = False

    def run_began(self, run: RunInfo) -> None:
        """Opens the tracker with the options of the run."""
        self._open(run, dict(flat(to_dict(run.config))))
        self._is_open = True

    def round_ended(self, record: RoundRecord) -> None:
        """Hands the figures of the round on."""
        self._log(scalars(record.line()), record.round)

    def round_probed(self, record: ProbeRecord) -> None:
        """Hands the figures of the probe on."""
        self._log(record.scalars(), record.round)

    def run_ended(self, summary: Summary) -> None:
        """Adds the figures that only the summary has, such as total_seconds, and closes."""
        known = {each.name for each in fields(RoundRecord)} | {"rounds", "resumed_after"}
        figures = scalars({k: v for k, v in asdict(summary).items() if k not in known})
        self._log(figures, summary.rounds)
        self.run_failed(None)

    def run_failed(self, error: BaseException | None) -> None:
        """Closes the tracker, unless it was closed before."""
        if self._is_open:
            self._is_open = False
            self._close(error)

    @abstractmethod
    def _open(self, run: RunInfo, options: dict[str, Any]) -> None:
        """Begins the run at the tracker, or continues it after ``run.rounds_done``."""

    @abstractmethod
    def _log(self, figures: dict[str, float], number: int) -> None:
        """Adds the figures of round ``number``, counted from 1."""

    @abstractmethod
    def _close(self, error: BaseException | None) -> None:
        """Ends the run at the tracker: it is finished, or ended early by ``error``."""


class TensorBoardLog(Tracker):
    """Writes an event file: a curve for each figure, and the options for the page HParams."""

    _writer: Any = None

    def _open(self, run: RunInfo, options: dict[str, Any]) -> None:
        """Opens the file; curves lose the points of rounds that are trained again."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        purge_step = run.rounds_done + 1 if run.rounds_done else None
        self._writer = SummaryWriter(str(run.run_dir), purge_step=purge_step)
        texts = {k: str(v) if isinstance(v, bool | list) else v for k, v in options.items()}
        # The first summary describes an experiment; without it, the page shows those of all runs.
        _, began, self._ended = hparams(texts, {})
        self._writer.file_writer.add_summary(began)

    def _log(self, figures: dict[str, float], number: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, number)

    def _close(self, error: BaseException | None) -> None:
        with suppress(OSError):
            if error is None:  # TensorBoard would keep a failure, also after the run has gone on
                self._writer.file_writer.add_summary(self._ended)
            self._writer.close()


class WandbLog(Tracker):
    """Sends options and figures to Weights & Biases; WANDB_MODE=offline keeps them in run_dir."""

    def _open(self, run: RunInfo, options: dict[str, Any]) -> None:
        import wandb

        tracking = run.config.tracking
        identifier = saved_ids(run.run_dir).get("wandb") or uuid.uuid4().hex[:8]
        _save_id(run.run_dir, "wandb", identifier)
        self._run = wandb.init(
            project=tracking.project,
            name=_name(run),
            tags=tracking.tags,
            config=options,
            dir=str(run.run_dir),
            id=identifier,
            resume="allow",
        )

    def _log(self, figures: dict[str, float], number: int) -> None:
        self._run.log(figures, step=number)

    def _close(self, error: BaseException | None) -> None:
        self._run.finish(exit_code=0 if error is None else 1)


class MlflowLog(Tracker):
    """Sends options and figures to MLflow: to MLFLOW_TRACKING_URI, or where MLflow keeps runs."""

    def _open(self, run: RunInfo, options: dict[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        identifier = saved_ids(run.run_dir).get("mlflow")
        self._id = identifier or self._create(run)
        _save_id(run.run_dir, "mlflow", self._id)
        self._client.update_run(self._id, status="RUNNING")
        # The options stay those of the begin: MLflow refuses other values.
        known = self._client.get_run(self._id).data.params
        params = [Param(k, str(v)[:6000]) for k, v in options.items() if k not in known]
        for first in range(0, len(params), 100):  # MLflow takes at most so many at once
            self._client.log_batch(self._id, params=params[first : first + 100])
        steps = self._client.get_metric_history(self._id, "train_loss")
        self._rounds_logged = max((each.step for each in steps), default=0)

    def _create(self, run: RunInfo) -> str:
        """Makes a run, and its experiment if it is the first there."""
        from mlflow.exceptions import MlflowException

        tracking = run.config.tracking
        experiment = self._client.get_experiment_by_name(tracking.project)
        if experiment is None:
            with suppress(MlflowException):  # another run may make it at the same time
                self._client.create_experiment(tracking.project)
            experiment = self._client.get_experiment_by_name(tracking.project)
        tags = dict.fromkeys(tracking.tags, "true")
        made = self._client.create_run(experiment.experiment_id, tags=tags, run_name=_name(run))
        return str(made.info.run_id)

    def _log(self, figures: dict[str, float], number: int) -> None:
        from mlflow.entities import Metric

        if number > self._rounds_logged or "train_loss" not in figures:
            now = int(1000 * time.time())
            metrics = [Metric(name, value, now, number) for name, value in figures.items()]
            self._client.log_batch(self._id, metrics=metrics)

    def _close(self, error: BaseException | None) -> None:
        ended = "KILLED" if isinstance(error, Stopped) else "FAILED"
        self._client.set_terminated(self._id, "FINISHED" if error is None else ended)


class CsvFile(RoundCallback):
    """Writes ``rounds.csv``: a row for each line of ``rounds.jsonl``, which must be written before.

    Cells of figures that a round does not have are empty.
    """

    def run_began(self, run: RunInfo) -> None:
        """Writes the rounds before an interruption."""
        self._folder = run.run_dir
        self._columns: list[str] = []
        if run.rounds_done:
            self._write_all()

    def round_ended(self, record: RoundRecord) -> None:
        """Adds a row; writes all rows if there are new columns."""
        row = _row(record.line())
        if row.keys() <= set(self._columns):
            line = io.StringIO(newline="")
            csv.DictWriter(line, self._columns).writerow(row)
            atomic_files.append_text(self._folder / "rounds.csv", line.getvalue())
        else:
            self._write_all()

    def _write_all(self) -> None:
        rows = [_row(record.line()) for record in saved_records.rounds(self._folder)]
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        atomic_files.replace_text(self._folder / "rounds.csv", table.getvalue())


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the cells of a line: fields of every record, also null, and the task's metrics."""
    return {k: v for k, v in line.items() if not isinstance(v, list)} | scalars(line)


_KINDS: dict[TrackerName, type[RoundCallback]] = {
    TrackerName.tensorboard: TensorBoardLog,
    TrackerName.csv: CsvFile,
    TrackerName.wandb: WandbLog,
    TrackerName.mlflow: MlflowLog,
}


def _name(run: RunInfo) -> str:
    return run.config.tracking.name or run.run_dir.resolve().name


def saved_ids(folder: Path) -> dict[str, str]:
    """Returns the identifiers that trackers gave to the run in ``folder``, by tracker.

    Raises ``FileError`` for a damaged file.
    """
    try:
        ids = reading.read_json_object(folder / _IDS)
    except FileNotFoundError:
        return {}
    if not fits(ids, dict[str, str]):
        raise reading.unusable(folder / _IDS, "its values are no texts")
    return ids


def _save_id(folder: Path, tracker: str, identifier: str) -> None:
    ids = {**saved_ids(folder), tracker: identifier}
    atomic_files.replace_text(folder / _IDS, json.dumps(ids) + "\n")
