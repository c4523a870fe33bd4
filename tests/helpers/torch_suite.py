"""torch's own tests of a backend, run one by one on ranks that already exist.

torch starts new processes for each test of ``torch.testing._internal.distributed``.  Here a rank
calls ``run`` for each test and gets a fresh default group each time, which takes milliseconds.
torch's tests are loaded on those ranks alone: loading them freezes the flags of torch's backends.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import unittest
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed as dist

PASSED, SKIPPED = "passed", "skipped"
_SECONDS = 30
"""Time-out of a test's default group; some tests have their own."""
_PROFILED = ("PROFILING", "CUDA_PROFILING", "SEND_RECV_PROFILING")


class _AsGloo(str):
    """A backend's name that tests take for gloo where they ask which backend they run on."""

    def __eq__(self, other: object) -> bool:
        return other in (str.__str__(self), "gloo")

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


@cache
def _module(size: int) -> Any:
    """torch's file, as it is for gloo: which tests are skipped is decided when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"BACKEND": "gloo", "WORLD_SIZE": str(size), "TEMP_DIR": folder}
        return import_module("torch.testing._internal.distributed.distributed_test")


@cache
def _suite(size: int) -> Any:
    module = _module(size)

    class Suite(module.TestDistBackend, module.DistributedTest._DistTestBase):  # type: ignore[misc, name-defined]
        pass

    return Suite


@cache
def _rank() -> int:
    return dist.get_rank()


def names(size: int) -> list[str]:
    """The names of torch's tests."""
    return sorted(unittest.TestLoader().getTestCaseNames(_suite(size)))


def run(name: str, backend: str, size: int, folder: str) -> str:
    """Runs one test on this rank; returns ``PASSED``, ``SKIPPED`` or a traceback.

    All ranks call it with the same ``folder``, which is new for each call.
    """
    module, rank = _module(size), _rank()
    for each in ("barrier", "test_dir", "init_dir"):
        (Path(folder) / each).mkdir(exist_ok=True)
    os.environ["TEMP_DIR"] = folder
    module.BACKEND, module.INIT_METHOD = _AsGloo(backend), f"file://{folder}/again"
    for prefix in _PROFILED:
        backends = getattr(module, f"{prefix}_SUPPORTED_BACKENDS")
        backends += [] if backend in backends else [backend]
    module.Barrier.barrier_id = 0
    test = _suite(size)(name)
    test.rank, test.file_name = rank, f"{folder}/store"
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            _run(test, name, module.CUSTOM_PG_TIMEOUT.get(name, _SECONDS))
        except unittest.SkipTest:
            return SKIPPED
        except SystemExit as end:
            return SKIPPED if end.code else PASSED
        except Exception:
            return traceback.format_exc()
        finally:
            sys.stdout.flush()
    return PASSED


def _run(test: Any, name: str, seconds: float) -> None:
    _leave_group()
    dist.init_process_group(
        _module(int(test.world_size)).BACKEND,
        init_method=test.init_method,
        world_size=int(test.world_size),
        rank=test.rank,
        timeout=timedelta(seconds=seconds),
    )
    import_module("torch.testing._internal.common_utils").set_rng_seed()
    test._barrier()
    getattr(test, name)()
    test._barrier()
    _leave_group()


def _leave_group() -> None:
    with suppress(ValueError, AssertionError):
        if dist.is_initialized():
            dist.destroy_process_group()
