"""The files of a checkpoint, which holds all that training needs to continue after a round.

round-000120.pt             the model, what else outlives a round, and the names of the shards
round-000120.states-1-0.pt  a shard: private client states of rank 1, in one or more files a rank

Each file is written under another name, synced and renamed; it holds a digest of its values, and
loads with torch's ``weights_only=True``, which runs no code from the file.  The first file is
written last.  ``checkpoint_writer`` writes these files and ``resume`` reads them.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.errors import ConfigError, format_option_error, one_line
from ..files import atomic_files, folders, torch_files
from ..files.reading import FileError, UnreadableFileError

FOLDER = "checkpoints"
"""In the folder of a run."""
FORMAT = 2
_NAME = re.compile(r"round-(\d+)(\.states-\d+-\d+)?\.pt")


class CorruptCheckpointError(Exception):
    """A checkpoint is not whole; the message says which file, and why."""


def path_of(folder: Path, number: int) -> Path:
    """Returns the path of the checkpoint after round ``number`` of the run in ``folder``."""
    return folder / FOLDER / f"round-{number:06d}.pt"


def shard_of(path: Path, rank: int, index: int) -> Path:
    """Returns the path of a shard of the checkpoint ``path``."""
    return path.with_name(f"{path.stem}.states-{rank}-{index}.pt")


def existing(folder: Path) -> list[Path]:
    """Returns the checkpoints of the run in ``folder``, newest first, whole or not."""
    matches = (_NAME.fullmatch(path.name) for path in (folder / FOLDER).glob("round-*.pt"))
    numbers = [int(match[1]) for match in matches if match and not match[2]]
    # A name with fewer digits is none that a run writes.
    paths = (path_of(folder, number) for number in sorted(set(numbers), reverse=True))
    return [path for path in paths if os.path.lexists(path)]


def round_of(path: Path) -> int:
    """Returns the round in the file name of a checkpoint or shard."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def write(path: Path, content: dict[str, Any]) -> str:
    """Writes ``content`` (plain values, tensors, and dicts and lists of them); returns its digest.

    Raises ``OSError``; a file that was at ``path`` is then still there.
    """
    digest = _digest(content)
    folders.make_below(path.parent)
    atomic_files.save(path, {"format": FORMAT, "digest": digest, **content})
    return digest


def read(path: Path) -> dict[str, Any]:
    """Returns what ``write`` wrote to ``path``.

    Raises ``FileNotFoundError``, ``CorruptCheckpointError``, and ``ConfigError``: for a file of
    another version, and as ``UnreadableFileError`` for one that cannot be read at the moment.
    """
    try:
        content = torch_files.load(path)
    except UnreadableFileError:
        raise
    except FileError as error:
        raise CorruptCheckpointError(str(error)) from error
    is_dict = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    has_kinds = is_dict and type(content.get("format")) is int
    if not has_kinds or not isinstance(content.get("digest"), str):
        raise CorruptCheckpointError(f"{path}: it is no checkpoint")
    version, digest = content.pop("format"), content.pop("digest")
    if version != FORMAT:
        remedy = f"this file has format {version}: continue with the version that wrote it, "
        remedy += "or choose another run_dir"
        allowed = f"a checkpoint of format {FORMAT}"
        raise ConfigError(format_option_error("resume", path, allowed, remedy))
    try:
        is_whole = digest == _digest(content)
    except (RecursionError, TypeError) as error:
        raise CorruptCheckpointError(f"{path}: {one_line(error)}") from error
    if not is_whole:
        raise CorruptCheckpointError(f"{path}: its values are not those that were written")
    return content  # type: ignore[no-any-return]


def read_shards(path: Path, digests: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Reads shards of the checkpoint ``path``; ``digests`` by file name.  Raises as ``read``."""
    for name, digest in digests.items():
        shard = read(path.parent / name)
        if _digest(shard) != digest:
            raise CorruptCheckpointError(f"{path.parent / name}: belongs to another checkpoint")
        yield shard
        del shard  # before the next one is read


def remove_all_but(folder: Path, keep: int) -> None:
    """Removes all checkpoints of the run in ``folder`` except the newest ``keep``, with shards."""
    paths = existing(folder)
    for path in paths[keep:]:
        _remove(path)
    oldest = round_of(paths[:keep][-1]) if paths else 0
    for shard in (folder / FOLDER).glob("round-*.states-*.pt"):
        if round_of(shard) < oldest:
            _remove(shard)


def _remove(path: Path) -> None:
    """Removes a file; what is a folder in its place stays, and harms nothing."""
    with suppress(IsADirectoryError):
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Removes files that a killed process was writing in the folder of a run."""
    for path in (folder / FOLDER).glob(".round-*"):
        _remove(path)


def _digest(content: dict[str, Any]) -> str:
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
