"""Hydra's flags, its own options and sweeps: what is taken, and one line for what is not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from fedtan_hpc import cli
from fedtan_hpc.command_line import flags
from fedtan_hpc.command_line.sweep import MOST_POINTS
from fedtan_hpc.config.errors import ConfigError


def told(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        cli.compose(words)
    [line] = caught.value.mistakes
    return line


def run_dirs(*words: str) -> list[str | None]:
    return [config.run_dir for config in cli.compose(words)]


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("seed=glob(x)", "a sweep without a value"),
        ("model=glob(zz*)", "a sweep without a value"),
        ("seed=range(0,-1)", "a sweep without a value"),
        ("seed=range(0,1000000000000000000)", f"1e+18 points: allowed is 1 to {MOST_POINTS}"),
        ("seed=range(0,1e18,0.1)", f"1e+19 points: allowed is 1 to {MOST_POINTS}"),
        (f"seed=range({MOST_POINTS + 1})", f"1001 points: allowed is 1 to {MOST_POINTS}"),
        ("seed=range(0,3,0)", "a step that is not 0"),
        ("seed=range(0,inf)", "a range has finite numbers"),
        ("seed=interval(0,1)", "a sweep has single values"),
        ("seed=shuffle(range(3))", "leave shuffle out"),
        ("=1", "not understood; write option=value"),
        ("@rounds=1", "not understood; write option=value"),
        (f"seed={'9' * 5000}", "not understood; write option=value"),
        (f"seed={'[' * 3000}", "not understood; write option=value"),
    ],
    ids=lambda text: text[:30],
)
def test_a_sweep_of_no_or_too_many_points_is_refused_at_once(word: str, part: str) -> None:
    start = time.monotonic()
    line = told("-m", word)
    assert line.startswith(word[:90] if len(word) > 200 else f"{word}: ")
    assert part in line
    assert len(line) < 500
    assert time.monotonic() - start < 30  # listing 10^18 points would take years


def test_points_of_several_options_are_multiplied() -> None:
    line = told("-m", "seed=range(100)", "rounds=range(1,100)")
    assert line.startswith("seed=range(100) rounds=range(1,100): 9900 points")


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("hydra.run.dir=mine", "use run_dir"),
        ("hydra.sweep.dir=mine", "use run_dir"),
        ("hydra.job.chdir=true", "use run_dir"),
        ("hydra/launcher=submitit_local", "python -m fedtan_hpc.submit"),
        ("hydra.launcher.n_jobs=2", "python -m fedtan_hpc.submit"),
        ("hydra/sweeper=optuna", "fedtan_hpc.run"),
        ("hydra.sweeper.n_trials=2", "fedtan_hpc.run"),
        ("hydra.mode=MULTIRUN", "use -m"),
        ("hydra.verbose=true", "leave it out"),
        ("+hydra=1", "leave it out"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("-m",)], ids=["single", "sweep"])
def test_hydras_own_options_are_refused_with_what_to_use(
    word: str, remedy: str, flags: tuple[str, ...]
) -> None:
    line = told(*flags, word)
    assert line.startswith(f"{word}: allowed is hydra.searchpath and hydra.sweeper.params")
    assert remedy in line


@pytest.mark.parametrize(
    "text",
    ["run:\n    dir: x", "sweep:\n    subdir: ${hydra.job.num}", "launcher:\n    _target_: x"],
)
def test_hydras_own_options_are_refused_in_files_too(text: str, tmp_path: Path) -> None:
    name = text.partition(":")[0]
    (tmp_path / "mine.yaml").write_text(f"defaults: [config, _self_]\nhydra:\n  {text}\n")
    line = told("--config-dir", str(tmp_path), "--config-name", "mine")
    assert line.startswith(f"hydra.{name}.")


def test_a_file_of_ones_own_needs_the_defaults_of_the_package(tmp_path: Path) -> None:
    words = ("--config-dir", str(tmp_path), "--config-name", "mine")
    (tmp_path / "mine.yaml").write_text("rounds: 3\n")
    assert 'begin that file with "defaults: [config, _self_]"' in told(*words)
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nrounds: 3\n")
    [config] = cli.compose([*words, "seed=5"])
    assert (config.rounds, config.seed) == (3, 5)
    assert told("--config-name", "absent").startswith("--config-name=absent: allowed is")
    assert told("--config-dir", "absent").startswith("--config-dir=absent: allowed is")


def test_a_file_can_describe_a_sweep(tmp_path: Path) -> None:
    text = "defaults: [config, _self_]\nhydra:\n  sweeper:\n    params:\n      run_dir: a,b\n"
    (tmp_path / "mine.yaml").write_text(text)
    words = ("--config-dir", str(tmp_path), "--config-name", "mine", "-m")
    assert run_dirs(*words) == ["a", "b"]
    assert run_dirs("-m", "+hydra.sweeper.params={run_dir: 'a,b'}") == ["a", "b"]


def test_a_sweep_of_hydras_own_begins_with_plus() -> None:
    line = told("-m", "hydra.sweeper.params.seed=1")
    assert line.startswith("hydra.sweeper.params.seed=1: not understood; ")
    assert "begins with +" in line


def test_flags_stand_anywhere() -> None:
    assert run_dirs("run_dir=${seed}", "-m", "seed=0,1", "rounds=3") == ["0", "1"]
    assert "allowed is one value; add -m" in told("seed=0,1")


def test_showing_a_sweep_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert told("--cfg", "job", "-m", "seed=0,1").startswith("-m: not understood beside a flag")
    assert told("--cfg", "job", "seed=0,1").startswith("seed=0,1: allowed is one value")
    assert cli.compose(["seed=7", "--cfg", "job", "rounds=3"]) == []
    assert "seed: 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [("--bogus",), ("--resolve",), ("--package", "x"), ("--config-path", "x")],
    ids=" ".join,
)
def test_flags_without_a_use_are_refused(words: tuple[str, ...]) -> None:
    assert words[0] in told(*words)


def test_the_number_of_a_point_has_a_value() -> None:
    assert run_dirs("-m", "seed=5,6", "run_dir=out/${hydra:job.num}") == ["out/0", "out/1"]
    assert run_dirs("run_dir=out/${hydra:job.num}") == ["out/0"]
    for word in ("run_dir=${hydra:runtime.output_dir}", "run_dir=${nothing}", "seed=${seed}"):
        assert told(word).startswith(f"{word}: not understood: ")


def test_an_error_of_hydra_without_a_name_gets_one() -> None:
    word = "optimizer=[1,2]"
    assert told("rounds=3", word, "seed=1").startswith(f"{word}: not understood: ")


def test_a_number_beyond_floats_gets_the_line_of_its_bound() -> None:
    line = told("rounds=3", f"optimizer.lr={'9' * 400}", "seed=1")
    assert line.startswith("optimizer.lr=9999")
    assert "allowed is a number >= 1e-38" in line
    assert len(line) < 500


def test_composing_leaves_the_callers_hydra_alone() -> None:
    before = GlobalHydra.instance().hydra
    cli.compose(["seed=1"])
    assert GlobalHydra.instance().hydra is before


def test_a_mistake_without_a_word_is_no_flags_and_no_sweeps() -> None:
    line = told("-m", "seed=0,1", "+hydra.sweeper.params.x=1")
    assert line.startswith("x=?: no such option")


def test_a_closed_output_is_no_mistake_of_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(flags, "show", closed)
    with pytest.raises(BrokenPipeError):
        cli.compose(["--help"])
