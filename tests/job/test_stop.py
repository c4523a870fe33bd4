"""Signals end a run after its round, and a sweep between its points."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path

import pytest

import fedtan_hpc
from fedtan_hpc.config.errors import OutputClosedError, Stopped
from fedtan_hpc.config.schema import CheckpointConfig
from fedtan_hpc.evaluation.callbacks import RoundCallback
from fedtan_hpc.evaluation.loggers import Display
from fedtan_hpc.evaluation.records import RoundRecord
from fedtan_hpc.job import checkpoint_format
from fedtan_hpc.job import run as run_module
from fedtan_hpc.job.round_losses import common_signal
from tests.helpers.jobs import ROUNDS, StopAfter, config_of, run, run_until


def test_a_sweep_stops_between_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the last round of one, which is finished."""
    configs = [config_of("fedtan", tmp_path / str(seed), seed=seed) for seed in range(3)]
    monkeypatch.setattr(run_module, "Display", lambda *_: StopAfter(ROUNDS))
    with pytest.raises(Stopped, match="stopped by SIGINT after 1 of 3 points"):
        run_module.run_all(configs)
    assert (tmp_path / "0" / "summary.json").exists()
    assert not (tmp_path / "1").exists()


class Unread(Display):
    """Its reader is ended by the same Ctrl-C, if there is one, before the round is over."""

    def __init__(self, signal_comes: bool) -> None:
        super().__init__()
        self.stop = StopAfter(4) if signal_comes else RoundCallback()

    def round_ended(self, record: RoundRecord) -> None:
        self.stop.round_ended(record)
        with pytest.MonkeyPatch.context() as patch:
            if record.round == 4:
                patch.setattr(sys, "stdout", ClosedPipe())
            super().round_ended(record)


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_left_does_not_keep_the_round_from_being_saved(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="after round 4"):
        fedtan_hpc.run(config_of("fedtan", tmp_path), callbacks=[Unread(signal_comes=True)])
    assert checkpoint_format.path_of(tmp_path, 4).exists()


def test_a_reader_that_left_ends_the_run_without_a_signal(tmp_path: Path) -> None:
    with pytest.raises(OutputClosedError):
        fedtan_hpc.run(config_of("fedtan", tmp_path), callbacks=[Unread(signal_comes=False)])


def test_a_run_that_nobody_saves_can_still_be_stopped(tmp_path: Path) -> None:
    config = config_of("fedtan", tmp_path, checkpoint=CheckpointConfig(every=None))
    run_until(config, 4)
    assert run(config_of("fedtan", tmp_path)).resumed_after == [4]


def test_signals_that_differ_are_one_end() -> None:
    assert common_signal(0, 0) == 0
    assert common_signal(3.0 * signal.SIGUSR1, 3) == signal.SIGUSR1
    assert common_signal(float(signal.SIGTERM + signal.SIGINT), 2) == signal.SIGTERM
