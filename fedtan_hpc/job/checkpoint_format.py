"""Checkpoints: all that training needs to go on after a round, in files that are whole or refused.

round-000120.pt             the model, what outlives rounds, and the states that clients keep
round-000120.states-1-0.pt  such states in files of their own, by rank, if they are very many

Each file is written under another name, synced and renamed, holds a digest of its values, and loads
with torch's ``weights_only=True``, which runs nothing that a file might hold.  The first is written
last, and names the others.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.errors import ConfigError, format_option_error, one_line
from ..runtime import atomic_files

FOLDER = "checkpoints"
"""In the folder of a run."""
FORMAT = 1
_NAME = re.compile(r"round-(\d+)\.pt")


class CorruptCheckpointError(Exception):
    """A checkpoint that is not whole; says which file, and why."""


def path_of(folder: Path, number: int) -> Path:
    """The checkpoint after round ``number`` of the run in ``folder``."""
    return folder / FOLDER / f"round-{number:06d}.pt"


def shard_of(path: Path, rank: int, index: int) -> Path:
    """A file of states beside the checkpoint ``path``."""
    return path.with_name(f"{path.stem}.states-{rank}-{index}.pt")


def existing(folder: Path) -> list[Path]:
    """The checkpoints of the run in ``folder``, the newest first; whole or not."""
    found = [path for path in (folder / FOLDER).glob("round-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=round_of, reverse=True)


def round_of(path: Path) -> int:
    """The round that a checkpoint's name says."""
    name = _NAME.fullmatch(path.name)
    return int(name[1]) if name else 0


def write(path: Path, content: dict[str, Any]) -> str:
    """Write ``content`` (plain values, tensors, and dicts and lists of them); returns its digest.

    Raises ``OSError``; what was at ``path`` is then still there.
    """
    digest = _digest(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.save(path, {"format": FORMAT, "digest": digest, **content})
    return digest


def read(path: Path) -> dict[str, Any]:
    """What ``write`` wrote to ``path``; states from other files are not among it.

    Raises ``CorruptCheckpointError``, ``OSError`` for a file that cannot be read now, and ``ConfigError`` for one
    that another version has written.
    """
    packed = io.BytesIO(path.read_bytes())
    try:
        content = torch.load(packed, map_location="cpu", weights_only=True)
        found = content.pop("format"), content.pop("digest")
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file torch raises whatever it meets
        raise CorruptCheckpointError(f"{path}: {one_line(error)}") from error
    if found[0] != FORMAT:
        remedy = "go on with the version that wrote it, or set resume=never"
        raise ConfigError(
            format_option_error("resume", path, f"a checkpoint of format {FORMAT}", remedy)
        )
    if found[1] != _digest(content):
        raise CorruptCheckpointError(f"{path}: its values are not those that were written")
    return content  # type: ignore[no-any-return]


def read_shard(path: Path, name: str, content: dict[str, Any]) -> dict[str, Any]:
    """The file of states ``name`` that belongs to the checkpoint at ``path``."""
    shard = read(path.parent / name)
    if _digest(shard) != content["shards"][name]:
        raise CorruptCheckpointError(
            f"{path.parent / name}: belongs to another checkpoint than {path}"
        )
    return shard


def remove_all_but(folder: Path, keep: int) -> None:
    """Remove all checkpoints of the run in ``folder`` but the last ``keep``, with their shards."""
    found = existing(folder)
    for path in found[keep:]:
        path.unlink(missing_ok=True)
    oldest = round_of(found[:keep][-1]) if found else 0
    for shard in (folder / FOLDER).glob("round-*.states-*.pt"):
        if int(shard.name[len("round-") :].split(".")[0]) < oldest:
            shard.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what was being written in the folder of a run when it was killed."""
    for path in (folder / FOLDER).glob(".round-*"):
        path.unlink(missing_ok=True)


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 over all values in order."""
    digest = hashlib.sha256()
    for value in _leaves(content):
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _leaves(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)
    else:
        yield value
