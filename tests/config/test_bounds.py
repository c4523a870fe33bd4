"""Every option that is a number has a lower and an upper bound, and messages are one short line."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from math import inf, nan
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from fedtan_hpc.config import help
from fedtan_hpc.config.errors import ConfigError, RunError, format_option_error, one_line, printable
from fedtan_hpc.config.hydra_errors import typed
from fedtan_hpc.config.schema import (
    Config,
    LrScheduleConfig,
    OptimizerConfig,
)
from fedtan_hpc.config.submit_options import LaunchConfig, SubmitConfig, check_launch
from fedtan_hpc.config.validate import check
from fedtan_hpc.config.validation.bounds import BOUNDS, LAUNCH_BOUNDS


def numeric(schema: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all options whose values are numbers or lists of numbers."""
    for name, hint in get_type_hints(schema).items():
        if is_dataclass(hint):
            yield from numeric(hint, f"{prefix}{name}.")
        elif {int, float} & kinds(hint):
            yield prefix + name


def kinds(hint: Any) -> set[Any]:
    if hint is Any:  # of which help says in words what is allowed
        return set()
    if get_origin(hint) in (Union, types.UnionType, list):
        return set().union(*map(kinds, get_args(hint)))
    return {hint}


def test_every_number_of_the_schema_has_a_bound() -> None:
    launch = {f"launch.{name}" for name in LAUNCH_BOUNDS}
    in_words = {e.option for e in help.entries(SubmitConfig) if "a whole number, " in e.allowed}
    assert in_words == {"algorithm.synchronise_every"}
    assert {*BOUNDS, *launch} == set(numeric(SubmitConfig)) | in_words
    for bound in (*BOUNDS.values(), *LAUNCH_BOUNDS.values()):
        assert -inf < bound.least < bound.most < inf
        examples = bound.example if isinstance(bound.example, list) else [bound.example]
        assert all(map(bound.contains, examples))


def with_option(option: str, value: object) -> Config:
    config = Config()
    group, _, name = option.rpartition(".")
    setattr(getattr(config, group) if group else config, name, value)
    return config


@pytest.mark.parametrize("option", BOUNDS)
def test_what_is_beyond_a_bound_is_one_line_that_names_it(option: str) -> None:
    bound = BOUNDS[option]
    is_list = isinstance(bound.example, list)
    values = [bound.least - 1 - abs(bound.least), 10 * abs(bound.most) + 1, 10**400, 10**5000]
    for number in [*values, *([] if isinstance(bound.least, int) else [nan, inf, -inf])]:
        with pytest.raises(ConfigError) as caught:
            check(with_option(option, [number] if is_list else number))
        [line] = [each for each in caught.value.mistakes if each.startswith(f"{option}=")]
        assert str(bound) in line
        assert len(line) < 400
        assert f"try {option}=" in line


def test_numbers_of_a_submission_are_bounded_too() -> None:
    with pytest.raises(ConfigError) as caught:
        check_launch(LaunchConfig(nodes=10**9, mem_gb=nan, timeout_min=10**5000))
    assert [line.partition("=")[0] for line in caught.value.mistakes] == [
        "launch.nodes",
        "launch.mem_gb",
        "launch.timeout_min",
    ]


def test_a_learning_rate_stays_finite_after_all_milestones() -> None:
    config = Config(rounds=500)
    config.lr_schedule = LrScheduleConfig(gamma=10.0, milestones=[*range(1, 400)])
    with pytest.raises(ConfigError, match=r"^lr_schedule.gamma=10.0: "):
        check(config)


@pytest.mark.parametrize(
    "config",
    [
        Config(rounds="9" * 5000),  # type: ignore[arg-type]
        Config(optimizer=OptimizerConfig(lr=10**400)),
        Config(optimizer=OptimizerConfig(betas=[10**5000])),
        Config(run_dir="${oops}"),
        Config(run_dir="???"),
        Config(rounds=b"\x1b"),  # type: ignore[arg-type]
    ],
)
def test_values_that_cannot_be_converted_are_one_line(config: Config) -> None:
    with pytest.raises(ConfigError) as caught:
        typed(config)
    [line] = caught.value.mistakes
    assert re.match(r"(rounds|optimizer\.lr|optimizer\.betas|run_dir)=", line)
    assert line.isprintable()
    assert len(line) < 500


NASTY = "a\nb\r\x1b[31m\u202e\u2028\udc80" + "x" * 10_000


def test_what_an_error_says_is_one_printable_line() -> None:
    lines = [
        printable(NASTY),
        format_option_error(NASTY, NASTY, NASTY, NASTY),
        format_option_error("callbacks", [NASTY] * 10_000, "a", "b"),
        one_line(ValueError(NASTY)),
        str(RunError(NASTY, on_all_ranks=True)),
        *ConfigError(NASTY, NASTY).mistakes,
        *ConfigError(*ConfigError(NASTY).mistakes).mistakes,
    ]
    for line in lines:
        assert line.isprintable()
        assert len(line) <= 3000
        assert line.encode()
    assert printable("x=ä 1: \\n stays") == "x=ä 1: \\n stays"
    assert printable("a\x1b[0m\nb") == "a\\x1b[0m\\nb"
