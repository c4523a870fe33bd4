"""Seconds that collectives take: by the host's clock for CPU tensors, by CUDA events on a GPU.

On a GPU a collective returns to the host before it is done.  CUDA events cost no synchronisation;
their times are read once the GPU has passed them.  ``collectives`` times, the trainer reads.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

AddSeconds = Callable[[float], None]
_pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, AddSeconds]] = deque()
"""Start and end events that the GPU may not have passed yet, oldest first."""


@contextmanager
def timed(device: torch.device, add_seconds: AddSeconds) -> Iterator[None]:
    """Gives the block's duration to ``add_seconds``; on a GPU later, at the latest in ``read``."""
    if device.type != "cuda":
        begin = time.perf_counter()
        yield
        add_seconds(time.perf_counter() - begin)
        return
    stream = torch.cuda.current_stream(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    yield
    end.record(stream)
    _pending.append((start, end, add_seconds))
    while _pending and _pending[0][1].query():
        _report_oldest()


def read() -> None:
    """Reports all durations that are still pending; waits until the GPU has passed their events."""
    while _pending:
        _pending[0][1].synchronize()
        _report_oldest()


def _report_oldest() -> None:
    start, end, add_seconds = _pending.popleft()
    add_seconds(start.elapsed_time(end) / 1000)
