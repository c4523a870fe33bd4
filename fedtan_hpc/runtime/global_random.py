"""The global generators of torch, ``random`` and ``numpy.random``: seeded, kept and restored.

A network may draw from any of them.  ``training`` seeds them in each step, ``distributed.lockstep``
gives each client its own sequence, and whatever runs a network gives the caller its states back.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CPU = torch.device("cpu")
_MT19937_BYTES = 4 * 625
"""624 words and a position."""

_numpy_seeded: tuple[int, bytes] = 0, b""
"""The last seed that numpy's generator got here, and its memory just afterwards."""


def seed(number: int, device: torch.device = _CPU) -> None:
    """Seeds the generators of the CPU with ``number``, 0 to 2^63 - 1, and the GPU ``device``'s."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    random.seed(number)
    _seed_numpy(number % 2**32)


@contextmanager
def preserved(gpus: Sequence[torch.device] = ()) -> Iterator[None]:
    """Restores the generators of the CPU and of ``gpus`` at the end.

    Inside, numpy's generator is the kind that can be seeded, whatever the caller has chosen.
    """
    python, kind, numpy = random.getstate(), np.random.mtrand.get_bit_generator(), _numpy_state()
    np.random.mtrand.set_bit_generator(np.random.MT19937(0))
    try:
        with torch.random.fork_rng(list(gpus)):
            yield
    finally:
        random.setstate(python)
        np.random.mtrand.set_bit_generator(kind)
        np.random.set_state(numpy)


@dataclass(frozen=True)
class GlobalStates:
    """The states of all generators that the calling thread may use at one time."""

    torch: Sequence[tuple[torch.Generator, Tensor]]
    python: tuple[Any, ...]
    numpy: int | dict[str, Any]
    """The seed, if nothing was drawn since: a whole state costs some 130 us to get and set."""

    @classmethod
    def get(cls) -> GlobalStates:
        """Returns the present states, of the CPU and of the current GPU if it is in use."""
        generators = [torch.default_generator]
        if torch.cuda.is_initialized():
            generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
        states = [(generator, generator.get_state()) for generator in generators]
        number, memory = _numpy_seeded
        is_new = _numpy_memory() == memory
        return cls(states, random.getstate(), number if is_new else _numpy_state())

    def set(self) -> None:
        """Restores the states."""
        for generator, state in self.torch:
            generator.set_state(state)
        random.setstate(self.python)
        if isinstance(self.numpy, int):
            _seed_numpy(self.numpy)
        else:
            np.random.set_state(self.numpy)


def _seed_numpy(number: int) -> None:
    global _numpy_seeded
    np.random.seed(number)
    _numpy_seeded = number, _numpy_memory()


def _numpy_state() -> dict[str, Any]:
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    return state


def _numpy_memory() -> bytes:
    """Returns the memory of numpy's generator: any number that is drawn changes it."""
    generator = np.random.mtrand.get_bit_generator()
    if not isinstance(generator, np.random.MT19937):
        return b"unknown"
    return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
