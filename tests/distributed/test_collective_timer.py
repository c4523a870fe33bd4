"""The timer of collectives: the host's clock, or CUDA events that a GPU passes later."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch

from fedtan_hpc.distributed import collective_timer


def test_a_cpu_reports_at_once() -> None:
    durations: list[float] = []
    with collective_timer.timed(torch.device("cpu"), durations.append):
        time.sleep(0.02)
    [seconds] = durations
    assert 0.02 <= seconds < 1


class Event:
    """A stand-in for a CUDA event: the test sets how many are passed; each takes a millisecond."""

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


def test_events_that_a_gpu_has_passed_are_reported(gpu: torch.device) -> None:
    """They are reported in order, without waiting, and do not pile up where nobody reads."""
    durations: list[tuple[str, float]] = []

    def add(name: str, seconds: float) -> None:
        durations.append((name, seconds))

    for name, passed in (("a", 0), ("b", 2), ("c", 3)):
        with collective_timer.timed(gpu, partial(add, name)):
            Event.passed = passed
    assert durations == [("a", 0.001)]
    collective_timer.read()
    assert durations == [("a", 0.001), ("b", 0.001), ("c", 0.001)]
    collective_timer.read()
    assert len(durations) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_real_gpu_times_the_work_in_its_stream() -> None:
    durations: list[float] = []
    values = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        with collective_timer.timed(values.device, durations.append):
            values @ values
    collective_timer.read()
    assert len(durations) == 3
    assert all(0 < seconds < 1 for seconds in durations)
