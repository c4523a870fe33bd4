"""Memory that a step on a CPU has freed, kept for the next one.

A step frees its activations all at once.  glibc gives what lies at the end of its memory back to
the system then, and every page of it costs a fault when the next step asks for it again.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_MEBIBYTE = 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
KEPT = {
    _MMAP_THRESHOLD: 32 * _MEBIBYTE,  # glibc's own choice, at most, once it has seen such blocks
    _TRIM_THRESHOLD: 256 * _MEBIBYTE,
}
"""Larger blocks are mapped, and given back, each by itself; of the others so much is kept."""
_OF_USERS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"


def keep_freed_memory(variables: Mapping[str, str] = os.environ) -> None:
    """Let this process keep ``KEPT`` bytes that it has freed, unless the user has chosen otherwise.

    Does nothing where the C library is not glibc.
    """
    if any(name in variables for name in _OF_USERS):
        return
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is not None:
        for option, value in KEPT.items():
            choose(option, value)
