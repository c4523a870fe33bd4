"""Settings of every test process.

It has one thread, so that ranks do not compete for cores.  It waits 1 s for a name server: torch
looks up the name of every address, and a lost answer costs 5 s otherwise.  It sees no GPU unless
the command line selects the mark ``gpu``, because all other tests check results of CPUs.
"""

import os
from collections.abc import Iterator
from types import CodeType
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("RES_OPTIONS", "timeout:1")


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs, except with ``-m gpu``."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With TEST_BACKEND=mpi deselects the tests that run no ranks: MPI changes nothing there."""
    if os.environ.get("TEST_BACKEND") != "mpi":
        return
    chosen = [item for item in items if any(_calls_ranks(each, set()) for each in _functions(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _functions(item: pytest.Item) -> Iterator[Any]:
    """Yields the test function and its fixtures."""
    assert isinstance(item, pytest.Function)
    yield item.function
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        yield from (definition.func for definition in definitions)


def _calls_ranks(function: Any, seen: set[int]) -> bool:
    """Whether a function of the tests names ``on_ranks``, or one that does."""
    function = getattr(function, "__wrapped__", function)
    code = getattr(function, "__code__", None)
    if code is None or id(code) in seen or "/tests/" not in code.co_filename:
        return False
    seen.add(id(code))
    names = set(_names(code))
    called = [function.__globals__.get(name) for name in names]
    return "on_ranks" in names or any(_calls_ranks(each, seen) for each in called)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
