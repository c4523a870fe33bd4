"""glibc's malloc set to keep memory that a step on a CPU has freed for the next step.  No torch.

A step frees its activations all at once.  By default glibc returns memory at the end of its heap to
the system, and each page costs a page fault when the next step allocates it again.
"""

import ctypes
import os
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_THRESHOLDS = {
    _MMAP_THRESHOLD: 32 * 2**20,  # larger blocks are mapped and returned one by one; glibc's limit
    _TRIM_THRESHOLD: 256 * 2**20,  # free bytes that the heap keeps
}
_USER_SETTINGS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"


def keep_freed_memory(variables: Mapping[str, str] = os.environ) -> None:
    """Lets this process keep up to 256 MiB that it has freed, unless ``variables`` set malloc.

    Does nothing if the C library is not glibc.
    """
    if any(name in variables for name in _USER_SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _THRESHOLDS.items():
            mallopt(option, value)
