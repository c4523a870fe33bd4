"""Any words of a command line: configurations, or one line for each mistake that names a word."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from fedtan_hpc import cli
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.help import entries
from fedtan_hpc.config.schema import Config

NAMES = [
    *(entry.option for entry in entries(Config)),
    *("optimizer", "model", "data", "experiment", "+experiment", "task", "hydra.run.dir"),
    *(
        "hydra/launcher",
        "hydra.sweeper.params.x",
        "hydra.searchpath",
        "hydra",
        "",
        "@",
        "a.b",
        "+x",
    ),
    *(
        "seed@x",
        "rounds.x",
        "data.options.x",
        "é",
        "1",
        "_target_",
        "seed ",
        "-",
        "~seed",
        "++seed",
    ),
]
VALUES = [
    *("", "0", "-1", "1e999", "nan", "9" * 400, "9" * 5000, "0x10", "1_000", "true", "null", "???"),
    *("[", "]", "[]", "{}", "{a:1}", "[" * 50, "[1,[2,{b:3}]]", "'", '"', "'a", "a,b", ",", "a b"),
    *("${seed}", "${x}", "${", "${hydra:job.num}", "${oc.env:NOT_SET}", "$", "${now:%Y}"),
    *("choice(1,2)", "choice()", "range(0,3)", "range(9,0)", "range(0,1e30)", "range(0,1,0)"),
    *("interval(0,1)", "glob(*)", "glob(x)", "shuffle(1,2)", "sort(2,1)", "tag(a,1)", "int(x)"),
    *("\n", "\x1b[31m", "\x00", "ü" * 300, "../..", "/", "extend_list(1)", "json_str('{')", "="),
]
FLAGS = ["-m", "--cfg", "job", "--config-name", "config", "--config-dir", "/", "-", "--"]
INPUTS = 150


def command_lines() -> Iterator[list[str]]:
    choose = random.Random(22)
    for _ in range(INPUTS):
        words = [
            f"{choose.choice(NAMES)}={choose.choice(VALUES)}"
            for _ in range(choose.choice([1, 1, 2]))
        ]
        words += choose.choices(FLAGS, k=choose.choice([0, 0, 0, 1, 2]))
        words += ["-m"] * choose.choice([0, 1])
        choose.shuffle(words)
        yield words


def problem_with(words: list[str]) -> str | None:
    """What is wrong with the answer to ``words``; None if nothing is."""
    start = time.monotonic()
    try:
        configs = cli.compose(words)
    except ConfigError as error:
        named = [word.partition("=")[0].strip("+ ") for word in words]
        for line in error.mistakes:
            if not any(name in line for name in named):
                return f"names no word: {line[:300]}"
    except SystemExit as error:
        return f"exit code {error.code}" if error.code else None
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    else:
        if not all(isinstance(config, Config) for config in configs):
            return "no configuration"
    return f"{time.monotonic() - start:.0f} s" if time.monotonic() - start > 20 else None


def test_any_words_are_composed_or_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    problems = [(problem_with(words), [word[:60] for word in words]) for words in command_lines()]
    capsys.readouterr()
    assert [found for found in problems if found[0]] == []
