"""Notes that ranks leave for each other without collectives, since a collective may be what hangs.

``process_group.start`` opens the channel; ``watchdog`` uses it.  No torch.
"""

from typing import Any


class Channel:
    """Texts by key in ``store``, a torch store that rank 0 or the launcher serves.

    Every call raises ``RuntimeError`` if the server does not answer.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    def write(self, key: str, text: str) -> None:
        """Stores ``text`` under ``key``."""
        self._store.set(key, text)

    def read(self, key: str) -> str | None:
        """Returns the text under ``key``, or None if no rank has written one."""
        return self._store.get(key).decode() if self._store.check([key]) else None

    def is_first(self, key: str) -> bool:
        """Returns True to the first caller on any rank, and False to all later ones."""
        return bool(self._store.add(key, 1) == 1)
