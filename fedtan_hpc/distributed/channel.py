"""Notes that ranks leave for each other beside the collectives, which may be what hangs."""

from __future__ import annotations

from typing import Any


class Channel:
    """Texts by key in a store that rank 0 or the launcher serves, with a connection of its own.

    Every call may raise ``RuntimeError`` when nobody answers.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    def write(self, key: str, text: str) -> None:
        """Leave a note."""
        self._store.set(key, text)

    def read(self, key: str) -> str | None:
        """The note, if there is one."""
        return self._store.get(key).decode() if self._store.check([key]) else None

    def is_first(self, key: str) -> bool:
        """Whether nobody has asked this before."""
        return bool(self._store.add(key, 1) == 1)
