"""Paths on the command line: letters that hydra's grammar refuses or changes, and ~."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtan_hpc import cli
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.submit_options import SubmitConfig
from fedtan_hpc.job import run_dir

PATHS = [
    "plain",
    "my run #1 é",
    "/data/größe/模型",
    "~/runs/a",
    "a'b",
    'a"b',
    'it\'s a "run"',
    "back\\slash",
    "ends in \\",
    "quote after \\'",
    " leading",
    "007",
    "1e3",
    "true",
    "a=b",
    "a:b",
    "a(b)",
    "[x]",
    "{x}",
    "50%",
    "@home",
    "a&b;c|d*?!",
    "tab\there",
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_arrive_as_they_are_written(path: str) -> None:
    [config] = cli.compose([f"++run_dir={path}", f"data.root={path}", f"resume={path}"])
    assert (config.run_dir, config.data.root, config.resume) == (path, path, path)
    [submitted] = cli.compose_as(SubmitConfig, "submit", [f"launch.folder={path}"])
    assert submitted.launch.folder == path


def run_dirs(*words: str) -> list[str | None]:
    return [config.run_dir for config in cli.compose(words)]


def test_quotes_null_and_interpolations_keep_their_meaning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_dirs("run_dir='my run'") == ["my run"]
    assert run_dirs('run_dir="my run"') == ["my run"]
    assert run_dirs("run_dir=null") == [None]
    assert run_dirs("run_dir=lr #${optimizer.lr}") == ["lr #0.1"]
    monkeypatch.setenv("SCRATCH", "/scratch/é")
    assert run_dirs("run_dir=${oc.env:SCRATCH}/a b") == ["/scratch/é/a b"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("run_dir=a,b", ["a", "b"]),
        ("run_dir=choice(a,b)", ["a", "b"]),
        ("run_dir='my run','other'", ["my run", "other"]),
        ("run_dir=my run #1,é", ["my run #1", "é"]),
        ("run_dir=é-${seed}", ["é-0", "é-1"]),
    ],
)
def test_paths_are_swept_as_before(word: str, expected: list[str]) -> None:
    seeds = ("seed=0,1",) if "seed" in word else ()
    assert run_dirs("-m", word, *seeds) == expected


def test_a_sweep_of_paths_needs_the_flag() -> None:
    with pytest.raises(ConfigError, match="-m"):
        cli.compose(["run_dir=a,b"])


def test_home_is_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert run_dir.name(Config(run_dir="~/runs/a")) == Path("/home/me/runs/a")
    assert run_dir.name(Config(run_dir="a~b")) == Path("a~b")
    assert run_dir.name(Config(run_dir="~nobody-of-this-name/a")) == Path("~nobody-of-this-name/a")
