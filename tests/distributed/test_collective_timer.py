"""Collectives are timed by the host's clock, or by events that a device passes later."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch

from fedtan_hpc.distributed import collective_timer


def test_a_host_hands_over_at_once() -> None:
    found: list[float] = []
    with collective_timer.timed(torch.device("cpu"), found.append):
        time.sleep(0.02)
    [seconds] = found
    assert 0.02 <= seconds < 1


class Event:
    """A stand-in for a GPU's: passed when the test says so; a millisecond each."""

    passed = 0
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.number = 0

    def record(self, stream: object) -> None:
        Event.made += 1
        self.number = Event.made

    def query(self) -> bool:
        return self.number <= Event.passed

    def synchronize(self) -> None:
        Event.passed = max(Event.passed, self.number)

    def elapsed_time(self, end: Event) -> float:
        assert end.query()
        return float(end.number - self.number)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    Event.passed = Event.made = 0

    def stream(device: Any) -> str:
        return "its stream"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    return torch.device("cuda")


def test_a_gpu_hands_over_what_it_has_passed(gpu: torch.device) -> None:
    """Without waiting for it, and in order; so that nothing piles up where nobody reads."""
    found: list[tuple[str, float]] = []

    def add(name: str, seconds: float) -> None:
        found.append((name, seconds))

    for name, passed in (("a", 0), ("b", 2), ("c", 3)):
        with collective_timer.timed(gpu, partial(add, name)):
            Event.passed = passed
    assert found == [("a", 0.001)]
    collective_timer.read()
    assert found == [("a", 0.001), ("b", 0.001), ("c", 0.001)]
    collective_timer.read()
    assert len(found) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_real_gpu_times_what_is_done_in_its_stream() -> None:
    found: list[float] = []
    values = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        with collective_timer.timed(values.device, found.append):
            values @ values
    collective_timer.read()
    assert len(found) == 3
    assert all(0 < seconds < 1 for seconds in found)
