"""Mistakes in the user's configuration files, and words that hydra alone would accept."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtan_hpc import cli
from fedtan_hpc.config.errors import ConfigError

GLOBAL = "# @package _global_\n"


def told(*words: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        cli.compose(words)
    return caught.value.mistakes


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (GLOBAL + "clients: many\n", ("own.yaml: clients=many: allowed is a whole number",)),
        (
            GLOBAL + "optimizer:\n  lr: fast\n",
            ("own.yaml: optimizer.lr=fast: allowed is a number",),
        ),
        (GLOBAL + "optimiser:\n  lr: 1\n", ("own.yaml: optimiser: no such", "mean optimizer?")),
        (GLOBAL + "optimizer:\n  rate: 1\n", ("own.yaml: optimizer.rate: no such option",)),
        (GLOBAL + "defaults:\n  - override /model: cmm\n", ("model=cmm: allowed is cnn | ",)),
        ("clients: 3\n", ("own.yaml: ", "begin the file with the line # @package _global_")),
        ("defaults:\n  - override /model: cnn\n", ("own.yaml: ", "# @package _global_")),
        (GLOBAL + "clients: [3\n", ("own.yaml, line 3: not valid YAML: expected",)),
    ],
)
def test_a_mistake_in_a_file_names_file_and_option(
    text: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(text)
    [line] = told("--config-dir", str(tmp_path), "experiment=own")
    for part in parts:
        assert part in line


@pytest.mark.parametrize("word", ["~optimizer.lr", "~model", "~seed=0"])
def test_options_are_not_taken_away(word: str) -> None:
    [line] = told(word)
    assert line.startswith(f"{word}: options cannot be removed; leave it out")


@pytest.mark.parametrize(
    ("word", "near"), [("modell=cnn", "model"), ("seeds=1", "seed"), ("lr=1", "optimizer.lr")]
)
def test_an_unknown_option_is_told_the_nearest(word: str, near: str) -> None:
    [line] = told(word)
    assert line.startswith(f"{word}: no such option; did you mean {near}")
