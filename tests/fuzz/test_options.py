"""Random options with nasty values: they are accepted, or told on one short, printable line each.

Seeded, in this process: options are given from Python, and some on the command line.
"""

from __future__ import annotations

import random
import re
import time
from math import inf, nan
from typing import Any

import pytest

from fedtan_hpc import cli
from fedtan_hpc.config.enums import DataName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.hydra_errors import typed
from fedtan_hpc.config.schema import Config, flat, to_dict
from fedtan_hpc.config.validate import check
from fedtan_hpc.config.validation.bounds import BOUNDS
from fedtan_hpc.data import memory_need
from fedtan_hpc.job import setup
from fedtan_hpc.runtime import free_memory
from tests.helpers.rounds import CPU

LONGEST = 3000
"""Characters of a line."""
FREE = 10**9
"""Bytes of memory that there are said to be."""
OPTIONS = [name for name, _ in flat(to_dict(Config()))] + ["data.options", "task.options"]
NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 10**6, 10**9, 10**10, 2**31, 2**63, 2**64, 10**26, 10**400, 10**5000),
    *(-(10**5000), 1e-300, 5e-324, 1e38, 1e308, -1e308, 0.5, 1.0, nan, inf, -inf),
]
TEXTS: list[Any] = [
    *("", " ", "\n", "a\nb", "\x1b[31mred\x1b[0m", "\u202eleft", "\udc80", "x" * 10_000, "\u2028"),
    *("\0", "é ü 名", "null", "None", "${oops}", "${", "???", "{}", "9" * 400, "9" * 5000, "1e999"),
    *("a:b", "a:b:c", ":", "../..", "/dev/null", "my_nets:net", "*", "nan", "true", "[1,2]"),
]
OTHERS: list[Any] = [
    *(None, True, False, b"\x1b", {}, {"a": 1}, {"\n": {"\x1b": 10**400}}, object(), 1j),
]
NAMES = ["synthetic", "iid", "dirichlet", "shards", "adam", "gn", "fedavg_gn", "singleset", "cnn"]
NAMES += ["cosine", "polynomial", "quantity", "feature_shift", "fixbn", "fedbn", "import", "folder"]


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if kind < 0.25 and depth < 3:
        length = rng.choice([0, 1, 2, 3, 3, 5, *([] if depth else [5000])])
        return (
            [value(rng, depth + 1)] * length
            if length > 5
            else [value(rng, depth + 1) for _ in range(length)]
        )
    return rng.choice(rng.choice([NUMBERS, NUMBERS, TEXTS, OTHERS, NAMES]))


def nasty(seed: int) -> tuple[Config, list[str]]:
    """A configuration with a few options set to random values, and the names of these options."""
    rng, config = random.Random(seed), Config()
    chosen = rng.sample(OPTIONS, rng.choice([1, 1, 2, 3, 6]))
    for option in chosen:
        group, _, name = option.rpartition(".")
        setattr(getattr(config, group) if group else config, name, value(rng))
    if rng.random() < 0.3:  # options of synthetic data count
        config.data.name = DataName.synthetic
        chosen += ["data.name"]
    return config, chosen


def told(config: Config) -> tuple[str, ...]:
    """The mistakes in the options; without any, what they need fits into memory."""
    try:
        checked = typed(config)
        check(checked)
        if not checked.data.is_own:
            setup.check_memory(checked, CPU, 1)
            assert sum(memory_need.data_bytes(checked).values()) <= FREE
    except ConfigError as error:
        return error.mistakes
    return ()


def check_lines(lines: tuple[str, ...], options: list[str]) -> None:
    for line in lines:
        assert line.isprintable(), ascii(line)
        assert len(line) <= LONGEST
        assert re.match(r"[\w.]+(\[[\w ]*\])?=", line), line
    if lines:
        groups = {option.partition(".")[0] for option in options}
        assert {re.split(r"[.=\[]", line)[0] for line in lines} & groups, (lines, options)


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "host_bytes", lambda ranks: FREE // ranks)


MOST = pytest.param(12, 212, id="most", marks=pytest.mark.slow)


@pytest.mark.parametrize(("first", "last"), [pytest.param(0, 12, id="some"), MOST])
def test_options_from_python_are_accepted_or_told_on_a_line(first: int, last: int) -> None:
    accepted, slowest = 0, 0.0
    for seed in range(first, last):
        config, options = nasty(seed)
        start = time.process_time()
        lines = told(config)
        slowest = max(slowest, time.process_time() - start)
        check_lines(lines, options)
        accepted += not lines
    assert (last - first) // 40 <= accepted < (last - first) // 2
    assert slowest < 10


@pytest.mark.parametrize(("first", "last"), [pytest.param(0, 6, id="some"), MOST])
def test_the_largest_numbers_are_accepted_or_told(first: int, last: int) -> None:
    """Combinations of numbers that are valid by themselves."""
    for seed in range(first, last):
        rng, config = random.Random(seed), Config()
        config.data.name = DataName.synthetic if seed % 2 else DataName.digits
        chosen = rng.sample([*BOUNDS], 4)
        for option in chosen:
            group, _, name = option.rpartition(".")
            holder: Any = getattr(config, group) if group else config
            bound = BOUNDS[option]
            number = bound.least if bound.is_below else bound.most
            is_list = isinstance(bound.example, list)
            setattr(holder, name, [number] * 3 if is_list else number)
        check_lines(told(config), [*chosen, "data"])


@pytest.mark.parametrize(("first", "last"), [pytest.param(0, 1, id="some"), MOST])
def test_options_on_the_command_line_are_accepted_or_told(first: int, last: int) -> None:
    names = [each for each in OPTIONS if not each.endswith("options")]
    numbers = ["9" * 400, "9" * 5000, "1e999", "-1e308", "[" + "9" * 400 + "]"]
    texts = [each for each in TEXTS if "\0" not in each]  # which no command line has
    for seed in range(first, last, 10):
        rng = random.Random(seed)
        option = rng.choice(names)
        word = f"{option}={rng.choice(rng.choice([texts, numbers]))}"
        lines: tuple[str, ...] = ()
        try:
            for config in cli.compose([word]):
                check_lines(told(config), [option])
        except ConfigError as error:
            lines = error.mistakes
        for line in lines:
            assert line.isprintable()
            assert len(line) <= LONGEST
            assert option.partition(".")[0] in line
