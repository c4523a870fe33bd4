"""Writes files that are either complete or absent, and adds lines to those that grow.

Used for checkpoints, results and reports.  ``folders.settle`` says which mode a file gets.
"""

import io
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from . import folders, reading


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` make a temporary file beside ``path``, then renames it to ``path``."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(temporary)
        folders.settle(temporary, path.parent)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replaces ``path`` by a file with the content ``text``."""
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save(path: Path, value: object) -> None:
    """Replaces ``path`` by ``value`` in torch.save's format; a full disk is an ``OSError``."""
    import torch

    packed = io.BytesIO()  # torch.save to a file would hide the reason of a failure
    torch.save(value, packed)
    replace(path, lambda temporary: temporary.write_bytes(packed.getbuffer()))


def append_text(path: Path, text: str) -> None:
    """Adds ``text`` at the end of a regular file, which is made if it is absent.

    Raises ``OSError``, and ``reading.FileError`` for anything but a file; never waits.
    """
    _write(path, text, os.O_APPEND | os.O_CREAT)


def create_text(path: Path, text: str) -> None:
    """Writes a new file; raises ``FileExistsError`` if anything has the name ``path``."""
    _write(path, text, os.O_EXCL | os.O_CREAT)


def _write(path: Path, text: str, flags: int) -> None:
    is_new = not os.path.lexists(path)
    if not is_new and not flags & os.O_EXCL:
        reading.check_regular(path, os.stat(path))
    flags |= os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o666), "w", encoding="utf-8", newline="") as file:
        reading.check_regular(path, os.fstat(file.fileno()))
        if is_new:
            folders.settle(file.fileno(), path.parent)
        file.write(text)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
