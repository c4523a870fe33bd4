"""Files that are either complete or absent; for checkpoints, results and reports."""

import io
import os
import uuid
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` make a temporary file beside ``path``, then renames it to ``path``."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(temporary)
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


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
