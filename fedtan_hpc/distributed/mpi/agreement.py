"""How ranks learn that they differ in what they call."""

import zlib

import numpy as np

from .library import MPI


class Agreement:
    """A small collective by which ranks learn that they do not call the same operation.

    Some MPI libraries give wrong values, and no error, for tensors of different sizes.  ``size`` is
    that of this rank's tensors in bytes; ranks compare name and size.
    """

    def __init__(self, comm: MPI.Intracomm, name: str, size: int) -> None:
        code = zlib.crc32(name.encode())
        self._extremes = np.array([code, -code, size, -size])
        self._request = comm.Iallreduce(MPI.IN_PLACE, self._extremes, MPI.MAX)

    def is_reached(self) -> bool:
        """Returns whether all ranks have called; raises ``ValueError`` if they differ."""
        if not self._request.Test():
            return False
        code, minus_code, most, minus_least = self._extremes.tolist()
        if code != -minus_code:
            raise ValueError("another rank calls another operation")
        if most != -minus_least:
            raise ValueError(f"the ranks give tensors of {-minus_least} to {most} bytes")
        return True
