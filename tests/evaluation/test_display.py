"""What a run shows: a bar where a person sees it, else plain lines without codes of a terminal."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedtan_hpc.config.schema import Config
from fedtan_hpc.evaluation import loggers
from fedtan_hpc.evaluation.callbacks import RunInfo
from fedtan_hpc.evaluation.records import RoundRecord
from fedtan_hpc.runtime import launcher_env

MPIRUN = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
RECORD = RoundRecord(
    round=1,
    clients=2,
    train_loss=0.5,
    learning_rate=0.1,
    round_seconds=0.1,
    evaluation_seconds=0.0,
    comm_messages=0,
    comm_bytes=0,
    payload_messages=0,
    payload_bytes=0,
    statistics_seconds=0.0,
    average_seconds=0.0,
)


@pytest.mark.parametrize(
    ("variables", "error_is_terminal", "is_drawn"),
    [
        ({}, True, True),
        (MPIRUN, True, False),  # its ranks write to terminals that it reads
        ({}, False, False),  # so do those of launchers that we do not know
    ],
    ids=["a terminal", "mpirun", "a log"],
)
def test_a_bar_is_drawn_where_a_person_sees_it(
    variables: dict[str, str],
    error_is_terminal: bool,
    is_drawn: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {**variables, "TERM": "xterm", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: error_is_terminal)
    display = loggers.Display()
    display.run_began(RunInfo(Config(rounds=2), Path(), 0))
    display.round_ended(replace(RECORD, test_loss=0.5, test_accuracy=0.5))
    display.run_failed(None)
    shown = capsys.readouterr().out
    assert ("\x1b" in shown) is is_drawn
    assert ("round 1/2  train loss 0.5000" in shown) is not is_drawn


def test_rounds_that_are_not_evaluated_show_a_line_each_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.monotonic()
    display = loggers.Display()
    display.run_began(RunInfo(Config(rounds=300), Path(), 0))
    for number in range(1, 301):
        monkeypatch.setattr(time, "monotonic", lambda at=now + number: at)
        display.round_ended(replace(RECORD, round=number))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["61/300", "122/300", "183/300", "244/300"]


def test_a_process_without_standard_streams_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert not launcher_env.writes_to_terminal({})
