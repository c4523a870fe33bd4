"""Trackers: what they keep of a run, also of one that was interrupted, and who is missing."""

from __future__ import annotations

import csv
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.hparams.backend_context import Context

from fedtan_hpc.config.enums import TrackerName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import Config, OptimizerConfig, ProbeConfig, TrackingConfig, to_dict
from fedtan_hpc.config.validate import check
from fedtan_hpc.config.validation import tracking as validation
from fedtan_hpc.evaluation import probe_records, trackers
from fedtan_hpc.evaluation.callbacks import RunInfo
from fedtan_hpc.evaluation.loggers import RoundsFile
from fedtan_hpc.evaluation.records import RoundRecord
from fedtan_hpc.evaluation.trackers import CsvFile, Tracker
from fedtan_hpc.job import run_dir
from tests.helpers.jobs import ROUNDS, config_of, rounds_of, run, run_until


def tracked(folder: Path, *to: str, **options: Any) -> Config:
    names = [TrackerName(each) for each in to]
    tracking = TrackingConfig(to=names, project="study", tags=["night", "pilot"])
    return config_of("fedavg", folder, tracking=tracking, **options)


def record_of(number: int, **options: Any) -> RoundRecord:
    counts = dict.fromkeys(
        ("comm_messages", "comm_bytes", "payload_messages", "payload_bytes", "clients"), 1
    )
    times = {"learning_rate": 0.1, "round_seconds": 1.0, "train_loss": 0.5}
    return RoundRecord(round=number, **counts, **times, **options)  # type: ignore[arg-type]


def test_numbers_of_a_line_and_short_lists_are_scalars() -> None:
    line = {"round": 3, "a": 1, "b": None, "c": [0.5, None, 0.7], "d": [0.5] * 21, "e": "text"}
    assert trackers.scalars(line) == {"a": 1, "c_0": 0.5, "c_2": 0.7}


def test_tensorboard_has_curves_and_options_of_all_runs(tmp_path: Path) -> None:
    run_until(config_of("fedavg", tmp_path / "a"), 3)
    for name, lr in (("a", 0.1), ("b", 0.2)):
        run(config_of("fedavg", tmp_path / name, optimizer=OptimizerConfig(lr=lr, momentum=0.9)))
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    for name in ("a", "b"):
        events = multiplexer.GetAccumulator(name)
        curve = {
            each.step: float(each.tensor_proto.float_val[0])
            for each in events.Tensors("test_accuracy")
        }
        expected = {r["round"]: r["test_accuracy"] for r in rounds_of(tmp_path / name)}
        assert curve == pytest.approx({k: v for k, v in expected.items() if v is not None})
        [last] = events.Tensors("total_seconds")
        assert last.step == ROUNDS
        assert not (tmp_path / name / "trackers.json").exists()
        content = events.PluginTagToContent("hparams")
        begin, end = sorted(content, reverse=True)
        session = plugin_data_pb2.HParamsPluginData.FromString(content[begin]).session_start_info
        assert session.hparams["optimizer.lr"].number_value == {"a": 0.1, "b": 0.2}[name]
        assert session.hparams["algorithm.name"].string_value == "fedavg"
        assert plugin_data_pb2.HParamsPluginData.FromString(content[end]).session_end_info.status
    experiment = _experiment(multiplexer, tmp_path)
    assert "optimizer.lr" in [each.name for each in experiment.hparam_infos]
    assert "test_accuracy" in [each.name.tag for each in experiment.metric_infos]


def _experiment(multiplexer: EventMultiplexer, folder: Path) -> Any:
    """What TensorBoard's page HParams is made from."""
    context, tensorboard = RequestContext(), TBContext()
    tensorboard.data_provider = MultiplexerDataProvider(multiplexer, str(folder))
    backend = Context(tensorboard)
    content = backend.hparams_metadata(context, "")
    return backend.experiment_from_metadata(context, "", True, content, [])


def test_tensorboard_has_curves_of_the_probe(tmp_path: Path) -> None:
    config = config_of("fedavg", tmp_path, probe=ProbeConfig(every=2))
    run(config)
    multiplexer = EventMultiplexer().AddRun(str(tmp_path), "a")
    multiplexer.Reload()
    events = multiplexer.GetAccumulator("a")
    records = {record.round: record for record in probe_records.read(tmp_path)}
    assert sorted(records) == [2, 4, 6]
    for name in records[2].scalars():
        curve = {each.step: float(each.tensor_proto.float_val[0]) for each in events.Tensors(name)}
        assert curve == pytest.approx({n: each.scalars()[name] for n, each in records.items()})


def test_a_table_has_the_rounds_of_an_interrupted_run_once(tmp_path: Path) -> None:
    run_until(tracked(tmp_path, "csv"), 3)
    (tmp_path / "rounds.csv").write_text("torn")
    run(tracked(tmp_path, "csv", "csv"))
    for row, line in zip(rows_of(tmp_path), rounds_of(tmp_path), strict=True):
        recall = line.pop("test_recall_by_class", [None] * 10)
        cells = {**line, **{f"test_recall_by_class_{n}": each for n, each in enumerate(recall)}}
        assert row == {name: text(cells.get(name)) for name in row}
        assert row.keys() >= cells.keys()
    assert [row["round"] for row in rows_of(tmp_path)] == [str(n + 1) for n in range(ROUNDS)]
    assert not list(tmp_path.glob("events.*"))


def test_a_table_gets_columns_when_metrics_come(tmp_path: Path) -> None:
    followers = RoundsFile(), CsvFile()
    for follower in followers:
        follower.run_began(RunInfo(Config(), tmp_path, 0))
    metrics = {"test_iou": 0.5, "test_class_iou": [0.25, None]}
    for record in (record_of(1), record_of(2, metrics=metrics), record_of(3)):
        for follower in followers:
            follower.round_ended(record)
    found = [[row["test_iou"], row["test_class_iou_0"]] for row in rows_of(tmp_path)]
    assert found == [["", ""], ["0.5", "0.25"], ["", ""]]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "rounds.csv", newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def text(value: object) -> str:
    return "" if value is None else str(value)


def test_a_tracker_is_closed_once_and_only_if_it_was_open(tmp_path: Path) -> None:
    closed = []

    class Noting(Tracker):
        def _open(self, run: RunInfo, options: dict[str, Any]) -> None:
            assert options["tracking.to"] == ["tensorboard"]

        def _log(self, figures: dict[str, float], number: int) -> None:
            raise AssertionError

        def _close(self, error: BaseException | None) -> None:
            closed.append(error)

    tracker, error = Noting(), ValueError()
    tracker.run_failed(error)
    assert not closed
    tracker.run_began(RunInfo(Config(), tmp_path, 0))
    tracker.run_failed(error)
    tracker.run_failed(error)
    assert closed == [error]


def test_trackers_do_not_identify_a_run(tmp_path: Path) -> None:
    plain, other = config_of("fedavg", tmp_path), tracked(tmp_path, "csv")
    assert run_dir.differences(to_dict(plain), other) == []
    plain.run_dir = other.run_dir = None
    assert run_dir.name(plain) == run_dir.name(other)


def test_a_run_that_begins_anew_sets_the_files_of_trackers_aside(tmp_path: Path) -> None:
    for name in ("rounds.jsonl", "rounds.csv", "trackers.json"):
        (tmp_path / name).write_text("old")
    (tmp_path / "wandb").mkdir()
    run_dir.begin(tmp_path, Config())
    kept = {path.name for path in (tmp_path / "interrupted-1").iterdir()}
    assert kept == {"rounds.jsonl", "rounds.csv", "trackers.json", "wandb"}


def test_a_tracker_that_is_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of its name in the current one, where W&B keeps runs, does not hide that."""
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    missing = ("only_a_folder", "json", "not_there_at_all")
    monkeypatch.setitem(validation._PACKAGES, TrackerName.wandb, missing)
    with pytest.raises(ConfigError) as caught:
        check(Config(tracking=TrackingConfig(to=[TrackerName.wandb, TrackerName.csv])))
    assert str(caught.value) == (
        "tracking.to=[wandb]: allowed is a tracker that is installed, with only_a_folder and "
        "not_there_at_all; pip install 'fedtan_hpc[wandb]'"
    )


@pytest.mark.parametrize("option", ["project", "name", "tags"])
def test_texts_of_trackers_are_not_blank(option: str) -> None:
    tracking = TrackingConfig()
    setattr(tracking, option, [" "] if option == "tags" else " ")
    with pytest.raises(ConfigError, match=rf"^tracking\.{option}=.*: allowed is text that is not"):
        check(Config(tracking=tracking))


@pytest.mark.slow
def test_mlflow_goes_on_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    pytest.importorskip("sqlalchemy", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_until(tracked(tmp_path / "a", "mlflow", threads=1), 3)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("study")
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.status == "KILLED"
    run(tracked(tmp_path / "a", "mlflow", threads=2))  # may differ; the run keeps its options
    run(tracked(tmp_path / "b", "mlflow"))
    [_, found] = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "a")
    params = found.data.params
    assert (params["optimizer.lr"], params["threads"]) == ("0.1", "1")
    assert params["algorithm.name"] == "fedavg"
    assert found.data.tags["pilot"] == "true"
    for name in ("train_loss", "test_accuracy"):
        history = client.get_metric_history(found.info.run_id, name)
        expected = {r["round"]: r[name] for r in rounds_of(tmp_path / "a") if r[name] is not None}
        assert {each.step: each.value for each in history} == pytest.approx(expected)
        assert len(history) == len(expected)
    assert found.data.metrics["total_seconds"] > 0


@pytest.mark.slow
def test_wandb_goes_on_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_until(tracked(tmp_path, "wandb"), 3)
    run(tracked(tmp_path, "wandb"))
    parts = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(parts) == 2
    deadline = time.monotonic() + 20
    while not all(any(r.HasField("exit") for r in wandb_records(part)) for part in parts):
        assert time.monotonic() < deadline  # a process of W&B writes the file
        time.sleep(0.05)
    records = [record for part in parts for record in wandb_records(part)]
    runs = [record.run for record in records if record.HasField("run")]
    identifier = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert {each.run_id for each in runs} == {identifier}
    assert (runs[0].project, runs[0].display_name) == ("study", tmp_path.name)
    assert list(runs[0].tags) == ["night", "pilot"]
    options = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert options["optimizer.lr"] == 0.1
    assert options["tracking.to"] == ["wandb"]
    losses = {}
    for each in (record.history for record in records if record.HasField("history")):
        values = {item.key or item.nested_key[0]: item.value_json for item in each.item}
        if "train_loss" in values:
            losses[each.step.num] = json.loads(values["train_loss"])
    assert losses == {r["round"]: r["train_loss"] for r in rounds_of(tmp_path)}
    codes = [record.exit.exit_code for record in records if record.HasField("exit")]
    assert codes == [1, 0]


def wandb_records(path: Path) -> Iterator[Any]:
    """The records in W&B's file: pieces in blocks of 32 KiB, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record, block = path.read_bytes(), 7, b"", 32768
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7
        record += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""
