"""torch's own tests of a backend: what passes over gloo passes over MPI, on 2 and 3 ranks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.ranks import ForkedWorld, MPIWorld, RankFailed, World

pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install -e '.[test]'")
pytest.importorskip("expecttest", reason="torch's tests need it: pip install -e '.[test]'")

from tests.helpers import torch_suite

GLOO_ALONE = "torch.distributed.monitored_barrier refuses every backend but gloo"
EXCEPTIONS = {
    "test_monitored_barrier_gloo": GLOO_ALONE,
    "test_monitored_barrier_gloo_rank_0_timeout": GLOO_ALONE,
    "test_monitored_barrier_gloo_subgroup": GLOO_ALONE,
}
"""Tests that pass over gloo and cannot pass over MPI, and why."""
LEAST = 80
"""Tests that pass over MPI, at least, with torch 2.11 to 2.13 on CPUs; others are skipped."""
SECONDS = 40
"""The longest that a test may take."""


class Suite:
    """Ranks of one backend that run torch's tests one after another."""

    def __init__(self, backend: str, size: int) -> None:
        self._start: Callable[[int], World] = MPIWorld if backend == "mpi4py" else ForkedWorld
        self._backend, self._size = backend, size
        self._world: World | None = None

    def names(self) -> list[str]:
        names: list[str] = self._call(torch_suite.names, self._size)[0]
        return names

    def run(self, name: str) -> str:
        """Returns PASSED or SKIPPED, or what went wrong; then new ranks run the next test."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes = self._call(torch_suite.run, name, self._backend, self._size, folder)
            except RankFailed as error:
                self.end()
                return str(error)
        known = (torch_suite.PASSED, torch_suite.SKIPPED)
        errors = [outcome for outcome in outcomes if outcome not in known]
        return "\n".join(errors) or outcomes[0]

    def _call(self, function: Callable[..., object], *arguments: object) -> list[Any]:
        if self._world is None:
            self._world = self._start(self._size)
            self._world.call(torch_suite.names, (self._size,), 100)  # loads torch's file
        return self._world.call(function, arguments, SECONDS)

    def end(self) -> None:
        if self._world is not None:
            self._world.end()
            self._world = None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [2, 3])
def test_what_passes_over_gloo_passes_over_mpi(
    size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    mpi, gloo, begin = Suite("mpi4py", size), Suite("gloo", size), time.monotonic()
    passed, worse = 0, {}
    try:
        names = [name for name in mpi.names() if name not in EXCEPTIONS]
        for number, name in enumerate(names):
            outcome = mpi.run(name)
            passed += outcome == torch_suite.PASSED
            # Over gloo runs only what does not pass over MPI.
            if outcome != torch_suite.PASSED and gloo.run(name) == torch_suite.PASSED:
                worse[name] = outcome
            if number % 25 == 24:
                with capsys.disabled():
                    seconds = time.monotonic() - begin
                    print(f"{size} ranks: {number + 1}/{len(names)}, {seconds:.0f} s", flush=True)
    finally:
        mpi.end()
        gloo.end()
    assert not worse, "\n\n".join(f"{name}: {outcome}" for name, outcome in worse.items())
    assert passed >= LEAST
