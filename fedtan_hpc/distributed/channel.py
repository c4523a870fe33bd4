"""Notes that ranks leave for each other without collectives, since a collective may be what hangs.

``process_group.start`` opens the channel; ``watchdog``, ``different_calls`` and ``cli`` use it.  No
torch.

Every user of the machine may reach the store that carries the notes.  So keys and notes are signed
with a secret of the job, which the ranks have exchanged by a collective: what a stranger writes is
as if it were not there.  Until the secret is known, nothing is written or read.
"""

import hmac
from datetime import timedelta
from typing import Any


class Channel:
    """Texts by key in ``store``, a torch store that rank 0 or the launcher serves.

    Every call raises ``RuntimeError`` if the server does not answer.
    """

    def __init__(self, store: Any, secret: str = "") -> None:
        self._store = store
        self.secret = secret
        """What only the ranks of this job know; empty until then."""

    def write(self, key: str, text: str) -> None:
        """Stores ``text`` under ``key``."""
        if self.secret:
            self._store.set(self._signed("key", key), self._signed(key, text) + text)

    def read(self, key: str) -> str | None:
        """Returns the text that a rank has written under ``key``, or None."""
        name = self._signed("key", key)
        if not self.secret or not self._store.check([name]):
            return None
        note: bytes = self._store.get(name)
        text = note[_SIGNATURE:].decode(errors="replace")
        is_ours = hmac.compare_digest(note[:_SIGNATURE], self._signed(key, text).encode())
        return text if is_ours else None

    def wait(self, key: str, patience: timedelta) -> str | None:
        """Returns what ``read`` returns, once there is a text; None after ``patience``."""
        try:
            self._store.wait([self._signed("key", key)], patience)
        except RuntimeError:
            return None
        return self.read(key)

    def is_first(self, key: str) -> bool:
        """Returns True to the first caller on any rank, and False to all later ones."""
        return bool(self.secret) and bool(self._store.add(self._signed("first", key), 1) == 1)

    def _signed(self, purpose: str, text: str) -> str:
        message = f"{purpose}\0{text}".encode()
        return hmac.new(self.secret.encode(), message, "sha256").hexdigest()


_SIGNATURE = 64
"""Length of a signature, in hexadecimal digits."""
