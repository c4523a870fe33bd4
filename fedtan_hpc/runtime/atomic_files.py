"""Files that are either whole or not there."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file beside ``path``, then put it in its place at once."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replace ``path`` by a file that holds ``text``."""
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save(path: Path, value: object) -> None:
    """Replace ``path`` by what torch.save makes of ``value``; a full disk is an ``OSError``."""
    import torch

    packed = io.BytesIO()  # torch's own writing to a file hides what went wrong
    torch.save(value, packed)
    replace(path, lambda temporary: temporary.write_bytes(packed.getbuffer()))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
