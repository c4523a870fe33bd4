"""Folders that hold a run: who may look into them, and that nothing bars the files to come.

A folder that is made is closed to other users.  In a folder that is closed to others, files get its
rights to read and write, whatever the umask; in any other folder the umask decides.
"""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .reading import check_regular, unusable

PRIVATE, GROUP = 0o700, 0o750
"""Modes of a run's folder: for its owner alone, or readable for the group."""


def make(folder: Path, mode: int = PRIVATE) -> None:
    """Makes ``folder`` with this mode; one that exists keeps its own.  Parents get the umask's."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    kept = stat.S_IMODE(folder.stat().st_mode) & 0o7000  # a group's folder may hand its group on
    with suppress(PermissionError):  # some file systems have no modes
        folder.chmod(kept | mode)


def make_below(folder: Path) -> None:
    """Makes ``folder`` with the mode of the folder that it is in."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    make(folder, stat.S_IMODE(folder.parent.stat().st_mode) & 0o777)


def settle(path: Path | int, folder: Path) -> None:
    """Gives a new file the rights of a ``folder`` that is closed to others."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    if not mode & 0o007:
        with suppress(PermissionError):
            os.chmod(path, mode & 0o660)


def check_free(folder: Path, files: Iterable[str], folders: Iterable[str] = ()) -> None:
    """Raises ``FileError`` if a name that a run writes is taken by something of another kind."""
    for name in files:
        path = folder / name
        if os.path.lexists(path):
            try:
                check_regular(path, os.stat(path))
            except OSError as error:  # a link to itself, or to nothing
                why = f"it is a link that leads to no file ({os.strerror(error.errno or 0)})"
                raise unusable(path, why, "remove or rename it") from error
    for name in folders:
        path = folder / name
        if os.path.lexists(path) and not path.is_dir():
            raise unusable(path, "it is no folder", "remove or rename it")


def open_lock(path: Path) -> int:
    """Opens or makes the file of a lock; returns its descriptor.

    Does not wait, follow links or open devices.  Raises ``FileError`` for anything but a file, and
    ``OSError``.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    if os.path.lexists(path):
        check_regular(path, os.lstat(path))
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise unusable(path, "it is not a regular file", "remove or rename it") from error
        raise
    try:
        check_regular(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
