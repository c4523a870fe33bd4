"""Callbacks of users: who is told what and when, and how a callback that fails ends the run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import ClassVar, NoReturn

import pytest

import fedtan_hpc
from fedtan_hpc import cli
from fedtan_hpc.config.errors import ConfigError, RunError, Stopped
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.evaluation.callbacks import RunInfo
from fedtan_hpc.evaluation.records import RoundRecord, Summary
from fedtan_hpc.job import checkpoint_format, run_dir
from fedtan_hpc.job import run as run_module
from fedtan_hpc.job.callbacks import as_run_error
from fedtan_hpc.runtime import signals
from fedtan_hpc.runtime.signals import Interrupted
from tests.helpers import commands
from tests.helpers.jobs import ROUNDS, StopAfter, config_of, run, run_until
from tests.helpers.ranks import on_ranks

HERE = "tests.job.test_callbacks"
SHORT = ("rounds=3", "local_steps=1", "eval_every=1", "run_dir=run")
FOLLOWER = """
import os, sys
from fedtan_hpc import RoundCallback

class Follower(RoundCallback):
    def run_began(self, run):
        print("follower: began", run.config.rounds, run.run_dir, run.rounds_done, flush=True)
    def round_ended(self, record):
        print("follower: round", record.round, flush=True)
    def run_ended(self, summary):
        print("follower: ended", summary.rounds, flush=True)

class Failing(RoundCallback):
    def round_ended(self, record):
        if record.round == 2:
            raise ValueError("a bad day")
"""


class Recorder(fedtan_hpc.RoundCallback):
    """Notes what it is told."""

    made: ClassVar[list[Recorder]] = []

    def __init__(self) -> None:
        self.told: list[str] = []
        self.made.append(self)

    def run_began(self, run: RunInfo) -> None:
        self.told.append(f"began after {run.rounds_done} of {run.config.rounds} in {run.run_dir}")

    def round_ended(self, record: RoundRecord) -> None:
        self.told.append(f"round {record.round}")

    def run_ended(self, summary: Summary) -> None:
        files = Path(summary.run_dir) / "summary.json", Path(summary.run_dir) / "model.pt"
        assert all(path.exists() for path in files)
        self.told.append("ended")

    def run_failed(self, error: BaseException) -> None:
        self.told.append(f"failed: {type(error).__name__}")


class Failing(Recorder):
    """Raises in one event."""

    def __init__(self, event: str = "round_ended") -> None:
        super().__init__()

        def fail(argument: object) -> None:
            if not isinstance(argument, RoundRecord) or argument.round == 4:
                raise ValueError("a bad day")

        setattr(self, event, fail)


def makes_nothing() -> None:
    """No callback."""


def raises() -> None:
    raise ValueError("no\nfile")


NOT_CALLABLE = "text"


def rounds(first: int, last: int = ROUNDS) -> list[str]:
    return [f"round {number}" for number in range(first, last + 1)]


def told_on_ranks(config: Config) -> list[str]:
    recorder = Recorder()
    fedtan_hpc.run(config, callbacks=[recorder])
    return recorder.told


def test_rank_0_tells_a_callback_of_begin_rounds_and_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        first, *others = on_ranks(ranks, told_on_ranks, config_of("fedtan", folder))
        assert first == [f"began after 0 of {ROUNDS} in {folder}", *rounds(1), "ended"]
        assert others == [[]] * (ranks - 1)
    assert capfd.readouterr().out == ""


def test_a_finished_run_tells_nothing(tmp_path: Path) -> None:
    run(config_of("fedtan", tmp_path))
    assert told_on_ranks(config_of("fedtan", tmp_path)) == []


def test_a_resumed_run_tells_the_rounds_that_are_done(tmp_path: Path) -> None:
    run_until(config_of("fedtan", tmp_path), 3)
    told = told_on_ranks(config_of("fedtan", tmp_path))
    assert told == [f"began after 3 of {ROUNDS} in {tmp_path}", *rounds(4), "ended"]


def test_the_option_makes_callbacks_beside_those_of_the_caller(tmp_path: Path) -> None:
    """An interrupted run has the same callbacks or others: they are no part of what it computes."""
    Recorder.made.clear()
    by_caller = Recorder()
    config = config_of("fedtan", tmp_path, callbacks=[f"{HERE}:Recorder", f"{HERE}:Recorder"])
    fedtan_hpc.run(config, callbacks=[by_caller])
    assert len(Recorder.made) == 3
    assert [each.told for each in Recorder.made] == [by_caller.told] * 3
    assert run(config_of("fedtan", tmp_path)).rounds == ROUNDS  # finished, whatever the callbacks
    plain, observed = config_of("fedtan", "x"), config_of("fedtan", "x", callbacks=["a:b"])
    plain.run_dir = observed.run_dir = None
    assert run_dir.name(plain) == run_dir.name(observed)


def test_a_signal_is_told_as_a_failure(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(Stopped):
        fedtan_hpc.run(config_of("fedtan", tmp_path), callbacks=[StopAfter(3), recorder])
    assert recorder.told[1:] == [*rounds(1, 3), "failed: Stopped"]


@pytest.mark.parametrize(
    ("event", "number", "told"),
    [
        ("run_began", 0, []),
        ("round_ended", 4, [*rounds(1, 3), "failed: RunError"]),
        ("run_ended", ROUNDS, [*rounds(1), "failed: RunError"]),
    ],
)
def test_a_callback_that_fails_is_named_and_the_others_are_told(
    event: str, number: int, told: list[str], tmp_path: Path
) -> None:
    recorder = Recorder()
    with pytest.raises(RunError) as caught:
        fedtan_hpc.run(config_of("fedtan", tmp_path), callbacks=[Failing(event), recorder])
    where = f"rank 0, round {number}: callback {HERE}.Failing.{event}: ValueError: a bad day"
    assert str(caught.value) == where
    assert not caught.value.on_all_ranks
    assert recorder.told[1:] == told
    assert json.loads((tmp_path / "failure.json").read_text())["message"] == where
    assert (tmp_path / "summary.json").exists() is (event == "run_ended")


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError("the pipe of a helper"),
        ConnectionResetError(104, "Connection reset by peer"),
        RuntimeError("upload: Connection reset by peer"),  # the words of gloo about a lost rank
        RunError("a run inside", on_all_ranks=True),
        Stopped("a run inside", 15),
    ],
    ids=repr,
)
@pytest.mark.parametrize("stops", [False, True])
def test_any_error_of_a_callback_is_reported(
    error: Exception,
    stops: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also while a signal stops the run; neither a lost rank nor a closed output is to blame."""

    def leave(code: int) -> NoReturn:
        raise SystemError(code)

    def fail(record: RoundRecord) -> None:
        if record.round == 4:
            raise error

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv("FEDTAN_HPC_FAILURE_FILE", str(tmp_path / "failed"))
    failing = Recorder()
    monkeypatch.setattr(failing, "round_ended", fail)
    callbacks = [StopAfter(4), failing] if stops else [failing]
    with pytest.raises(SystemError, match="1"), cli.exit_codes("fedtan_hpc"):
        fedtan_hpc.run(config_of("fedtan", tmp_path / "run"), callbacks=callbacks)
    told = capfd.readouterr().err
    line = f"fedtan_hpc: rank 0, round 4: callback {HERE}.Recorder.round_ended: "
    assert told.splitlines()[-1] == f"{line}{type(error).__name__}: {error}"
    assert "in fail\n" in told  # the traceback
    assert (tmp_path / "failed").exists()
    assert checkpoint_format.path_of(tmp_path / "run", 4).exists()


def test_checkpoints_stay_when_a_callback_fails(tmp_path: Path) -> None:
    """That of the round in which it fails is saved too."""
    with pytest.raises(RunError):
        fedtan_hpc.run(config_of("fedtan", tmp_path), callbacks=[Failing()])
    for number in (2, 4):
        checkpoint_format.read(checkpoint_format.path_of(tmp_path, number))
    assert run(config_of("fedtan", tmp_path)).resumed_after == [4]


def test_a_second_failure_is_printed_and_does_not_hide_the_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    callbacks = [Failing("run_failed"), Failing()]
    with pytest.raises(RunError, match=r"Failing\.round_ended"):
        fedtan_hpc.run(config_of("fedtan", tmp_path), callbacks=callbacks)
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"fedtan_hpc: rank 0, round 4: callback {HERE}.Failing.run_failed: ")


WRONG = {
    "no.such.module:Callback": "allowed is package.module:callable, found on PYTHONPATH; Module",
    f"{HERE}:NO_SUCH": "allowed is package.module:callable, found on PYTHONPATH; AttributeError",
    f"{HERE}:NOT_CALLABLE": "allowed is a callable; this is a str, not something that makes a",
    f"{HERE}:raises": "allowed is a callable without arguments; it raised ValueError: no file",
    f"{HERE}:rounds": "allowed is a callable without arguments; it raised TypeError: rounds()",
    f"{HERE}:makes_nothing": "returns a fedtan_hpc.RoundCallback; it returned a NoneType, which",
}


def mistake_of(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        fedtan_hpc.run(config, callbacks=[])
    assert caught.value.on_all_ranks
    [line] = caught.value.mistakes
    return line


@pytest.mark.parametrize("target", WRONG)
def test_a_wrong_option_is_one_line_on_every_rank(target: str, tmp_path: Path) -> None:
    lines = on_ranks(2, mistake_of, config_of("fedtan", tmp_path, callbacks=[target]))
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"callbacks={target}: ")
    assert WRONG[target] in lines[0]
    assert "\n" not in lines[0]
    assert not (tmp_path / "rounds.jsonl").exists()


@pytest.mark.parametrize("target", ["module", "module:", "a module:callable", ":callable", "a:b:c"])
def test_a_target_of_another_form_is_found_without_an_import(target: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(Config(callbacks=["my.module:Plot", target]))
    [line] = caught.value.mistakes
    assert line.startswith(f"callbacks={target}: allowed is package.module:callable; for example")


def test_a_sweep_finds_a_wrong_callback_before_its_first_point(tmp_path: Path) -> None:
    configs = [config_of("fedtan", tmp_path / "a"), config_of("fedtan", tmp_path / "b")]
    configs[1].callbacks = [f"{HERE}:NO_SUCH"]
    with pytest.raises(ConfigError, match="NO_SUCH"):
        run_module.run_all(configs)
    assert not list(tmp_path.iterdir())


def test_rank_0_alone_imports_callbacks(tmp_path: Path) -> None:
    """Before the first point of a sweep and in each; what their module does, happens once."""
    (tmp_path / "follower.py").write_text(FOLLOWER + "print('imported by', os.environ['RANK'])\n")
    words = ("-m", "seed=0,1", *SHORT[:-1], "callbacks=[follower:Follower]")
    done = commands.ranks(2, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    imports = [line for line in done.stdout.splitlines() if line.startswith("imported by")]
    assert imports == ["imported by 0"]
    assert done.stdout.count("follower: ended") == 2


def test_the_display_stays_beside_the_callbacks_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "follower.py").write_text(FOLLOWER)
    done = commands.ranks(2, *SHORT, "callbacks=[follower:Follower]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("follower: ")]
    began, *later = told
    assert began == "follower: began 3 run 0"
    assert later == [
        "follower: round 1",
        "follower: round 2",
        "follower: round 3",
        "follower: ended 3",
    ]
    assert "round 2/3" in done.stdout
    assert "test accuracy" in done.stdout


@pytest.mark.slow
def test_a_callback_that_fails_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "follower.py").write_text(FOLLOWER)
    words = (*SHORT, "checkpoint.every=1", "callbacks=[follower:Failing]")
    done = commands.run(
        "torchrun", "--nproc-per-node", "2", "-m", "fedtan_hpc", *words, cwd=tmp_path
    )
    assert done.returncode == 1
    line = "fedtan_hpc: rank 0, round 2: callback follower.Failing.round_ended: ValueError: a bad"
    assert done.stderr.count(line) == 1
    assert 'raise ValueError("a bad day")' in done.stderr
    checkpoint_format.read(checkpoint_format.path_of(tmp_path / "run", 1))


def test_a_wrong_option_is_one_line_of_the_command(tmp_path: Path) -> None:
    for done in (
        commands.job(*SHORT, "callbacks=[no.such:Callback]", cwd=tmp_path),
        commands.ranks(2, *SHORT, "callbacks=[no.such:Callback]", cwd=tmp_path),
    ):
        [line] = done.stderr.splitlines()
        assert line.startswith("fedtan_hpc: callbacks=no.such:Callback: allowed is package.module")
        assert done.returncode == (2 if "python" in done.args else 1)
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt("a key"), ValueError("bad")])
def test_whatever_the_users_code_raises_is_that_of_its_rank_and_round(error: BaseException) -> None:
    with pytest.raises(RunError, match=r"^rank 0, round \d+: ") as raised, as_run_error():
        raise error
    assert f"{type(error).__name__}: {error}" in str(raised.value)


def test_ctrl_c_is_not_of_the_users_code() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may have another
    try:
        with signals.interrupted_by_ctrl_c(), pytest.raises(Interrupted), as_run_error():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
