"""Provides the files of data sets: checks them, or downloads them with torchvision.

Used by ``job``, in one process of each machine.
"""

import os
import socket
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from tempfile import TemporaryDirectory

from ..config.errors import ConfigError, format_option_error, one_line
from ..config.schema import DataConfig
from ..files import reading
from ..runtime.torchvision_import import import_torchvision
from .image_files import SOURCES, damaged, find, missing, read, root_of

_SOCKET_TIMEOUT = 20.0
"""Seconds without data after which a download fails; some networks drop all traffic silently."""
_ARCHIVE_BYTES = 2**30
_ERRORS = OSError, EOFError, RuntimeError, ValueError, HTTPException, TarError, zlib.error
"""Errors that downloading and unpacking raise."""


def fetch(config: DataConfig) -> None:
    """Finds or downloads the files and checks that they are whole; then any process may read them.

    Does nothing for data sets without files.  Raises ``ConfigError`` that says which files to put
    where.
    """
    if config.name not in SOURCES:
        return
    root = root_of(config)
    if root.exists() and not root.is_dir():
        allowed, remedy = "a folder, and this is a file", "name another, or leave it out for ./data"
        raise ConfigError(format_option_error("data.root", root, allowed, remedy))
    if find(config) is None:
        _download(config)
    read(config)


def _download(config: DataConfig) -> None:
    """Downloads into a temporary folder first, so that no reader finds incomplete files."""
    source, root = SOURCES[config.name], root_of(config)
    dataset_class = getattr(import_torchvision().datasets, source.torchvision_class)
    archive = _archive(config)
    root_is_new = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _download_settings(), TemporaryDirectory(prefix=".download-", dir=root) as temporary:
            if archive:
                (Path(temporary) / archive.name).symlink_to(archive)
            dataset_class(temporary, download=True)
            _move(Path(temporary) / source.folder, root / source.folder)
    except _ERRORS as error:
        if root_is_new:
            with suppress(OSError):
                root.rmdir()
        raise missing(config, f"could not be downloaded ({one_line(error)})") from None


def _archive(config: DataConfig) -> Path | None:
    """Returns the checked archive of all files, if the user has put it into the root folder."""
    source, root = SOURCES[config.name], root_of(config)
    if source.archive is None or not os.path.isfile(path := root / source.archive):
        return None
    datasets = import_torchvision().datasets
    checksum = getattr(datasets, source.torchvision_class).tgz_md5
    reading.check_file(path, _ARCHIVE_BYTES)
    if not datasets.utils.check_integrity(path, checksum):
        raise damaged(config, path, "its checksum is wrong")
    return path


def _move(folder: Path, target: Path) -> None:
    """Moves atomically; does nothing if another machine on the shared disk was faster."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise


@contextmanager
def _download_settings() -> Iterator[None]:
    """Gives new sockets a timeout and sends torchvision's messages to standard error."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SOCKET_TIMEOUT)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)
