"""Files of data sets: seen to be there and whole, else downloaded by torchvision."""

from __future__ import annotations

import os
import socket
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

from ..config.schema import DataConfig
from ..config.errors import ConfigError, format_option_error, one_line
from .image_files import SOURCES, damaged, find, missing, read, root_of
from ..runtime.torchvision_import import import_torchvision

_SILENCE = 20.0
"""Seconds without a sign of life after which a download fails; networks may swallow all traffic."""
_FAILURES = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    HTTPException,
    tarfile.TarError,
    zlib.error,
)
"""What downloads end in."""


def fetch(config: DataConfig) -> None:
    """Find the files, or download them, and see that they are whole; any process may then read.

    For one process of each machine.  Nothing to do for data sets without files.
    Raises ``ConfigError``, which says what to put where.
    """
    if config.name not in SOURCES:
        return
    root = root_of(config)
    if root.exists() and not root.is_dir():
        remedy = "name another, or leave it out for ./data"
        raise ConfigError(format_option_error("data.root", root, "a folder, and this is a file", remedy))
    if find(config) is None:
        _download(config)
    read(config)


def _download(config: DataConfig) -> None:
    """Into a folder of its own first, so that no reader ever meets half a file."""
    source, root = SOURCES[config.name], root_of(config)
    kind = getattr(import_torchvision().datasets, source.kind)
    archive = _archive(config)
    new = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _patience(), TemporaryDirectory(prefix=".download-", dir=root) as workplace:
            if archive:
                (Path(workplace) / archive.name).symlink_to(archive)
            kind(workplace, download=True)
            _move(Path(workplace) / source.folder, root / source.folder)
    except _FAILURES as error:
        if new:
            with suppress(OSError):
                root.rmdir()
        raise missing(config, f"could not be downloaded ({one_line(error)})") from None


def _archive(config: DataConfig) -> Path | None:
    """The one file that holds all others, if somebody has put it into the root; it is whole."""
    source, root = SOURCES[config.name], root_of(config)
    path = root / source.files[0]
    if len(source.files) > 1 or not os.path.isfile(path):
        return None
    datasets = import_torchvision().datasets
    if not datasets.utils.check_integrity(path, getattr(datasets, source.kind).tgz_md5):
        raise damaged(config, path, "its checksum is wrong")
    return path


def _move(folder: Path, target: Path) -> None:
    """At one stroke; another machine that shares the disk may have been faster."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise


@contextmanager
def _patience() -> Iterator[None]:
    """Inside, new sockets wait no longer than ``_SILENCE``, and chatter goes to stderr."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)
