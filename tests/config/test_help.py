"""--help: two screens with all names, and all about the options of a group with --help=GROUP."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest

import fedtan_hpc
from fedtan_hpc import cli
from fedtan_hpc.config import help
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.submit_options import SubmitConfig
from tests.helpers.commands import ROOT

SCHEMAS = {"config": Config, "submit": SubmitConfig}


def shown(capsys: pytest.CaptureFixture[str], *words: str, entry: str = "config") -> str:
    """The output of a command that only shows something."""
    with suppress(SystemExit):  # hydra leaves so after --help
        assert cli.compose_as(SCHEMAS[entry], entry, words) == []
    return capsys.readouterr().out


@pytest.mark.parametrize("entry", SCHEMAS)
@pytest.mark.parametrize("columns", [80, 100])
def test_help_is_two_screens_with_every_name(
    entry: str,
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(capsys, "--help", entry=entry)
    lines = text.splitlines()
    assert len(lines) <= 76
    assert max(map(len, lines)) <= columns
    words = " ".join(text.split())
    for group in help.groups(SCHEMAS[entry]):
        names = [each.option.rpartition(".")[2] for each in group.entries]
        assert f" {group.name} {group.purpose} {', '.join(names)} " in words
    for folder in (ROOT / "conf").iterdir():
        files = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        if folder.is_dir() and (folder.name != "launch" or entry == "submit"):
            assert f" {folder.name} {files} " in words


def test_the_package_says_in_one_sentence_what_it_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [description] = re.findall(r'^description = "(.*)"$', text, flags=re.MULTILINE)
    for words in (fedtan_hpc.__doc__, shown(capsys, "--help")):
        assert " ".join(str(words).split()).startswith(f"{description} ")


def test_choices_of_ones_own_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nrounds: 3\n")
    text = shown(capsys, "--config-dir", str(tmp_path), "--help")
    assert ", mine, " in " ".join(text.split())


@pytest.mark.parametrize("group", help.groups(SubmitConfig), ids=lambda group: group.name)
def test_help_on_a_group_has_all_about_its_options(
    group: help.Group, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, f"--help={group.name}", entry="submit")
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert words.startswith(f"{group.name}: {group.purpose} ")
    for entry in group.entries:
        meaning = " ".join(entry.meaning.split())
        assert f" {entry.option}={entry.default} [{entry.allowed}] {meaning}" in words
    assert text.count("\n  ") - text.count("\n   ") == len(group.entries)
    assert text.strip() in shown(capsys, "--help=all", entry="submit")


@pytest.mark.parametrize("name", ["modle", "", "clients", "launch"])
def test_an_unknown_group_is_one_line_with_the_groups(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.compose(["rounds=3", f"--help={name}"])
    [line] = caught.value.mistakes
    assert line.startswith(f"--help={name}: allowed is all | run | algorithm | ")
    assert line.endswith(" | probe; choose one of these")


@pytest.mark.parametrize("option", ["rounds=a", "optimizer.lr=a", "launch.nodes=a"])
def test_wrong_types_name_the_help_that_helps(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"--help=\w+ says") as caught:
        cli.compose_as(SubmitConfig, "submit", [option])
    command = caught.value.mistakes[0].rpartition("; ")[2].split()[0]
    assert f"  {option.partition('=')[0]}=" in shown(capsys, command, entry="submit")


def test_every_option_belongs_to_one_group_and_is_explained() -> None:
    names = [entry.option for entry in help.entries(SubmitConfig)]
    assert len(names) == len(set(names)) > 70
    assert {"run_dir", "model.target", "launch.nodes"} <= set(names)
    for group in help.groups(SubmitConfig):
        for text in (group.purpose, *(entry.meaning for entry in group.entries)):
            assert text.endswith("."), text
