"""How long collectives take: by the host's clock, on a GPU by events in its stream.

A GPU's collective returns to the host before it is done.  Events cost no synchronisation; they are
read when the device has passed them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Add = Callable[[float], None]
_ahead: deque[tuple[torch.cuda.Event, torch.cuda.Event, Add]] = deque()
"""Of work that the device may not have passed yet."""


@contextmanager
def timed(device: torch.device, add: Add) -> Iterator[None]:
    """Hand the seconds of what is done inside to ``add``; on a GPU later, or by ``read``."""
    if device.type != "cuda":
        begun = time.perf_counter()
        yield
        add(time.perf_counter() - begun)
        return
    stream = torch.cuda.current_stream(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    yield
    end.record(stream)
    _ahead.append((start, end, add))
    while _ahead and _ahead[0][1].query():
        _hand_over()


def read() -> None:
    """Hand over all that GPUs have timed; waits for what they have not done yet."""
    while _ahead:
        _ahead[0][1].synchronize()
        _hand_over()


def _hand_over() -> None:
    start, end, add = _ahead.popleft()
    add(start.elapsed_time(end) / 1000)
