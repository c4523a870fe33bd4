"""Whose a file is: what another user may have written is not obeyed without the user's word."""

import os
import stat
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .reading import raise_unreadable, unusable


def check(paths: Iterable[Path], remedy: str) -> None:
    """Raises ``FileError`` for the first path that another user owns or that anybody may write.

    Root and this process's user are trusted, and so are the members of the group, because many
    clusters give all folders to a group of one user.  Absent paths are left out.
    """
    for path in paths:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise_unreadable(path, error)
        if why := _mistrust(path, status):
            raise unusable(path, why, remedy)


def _mistrust(path: Path, status: os.stat_result) -> str:
    if status.st_mode & stat.S_IWOTH and not _new_file(path.parent).st_mode & stat.S_IWOTH:
        return "every user can write it"
    if status.st_uid not in (0, os.geteuid()) and status.st_uid != _new_file(path.parent).st_uid:
        return f"it belongs to another user (number {status.st_uid})"
    return ""


class _NewFile(NamedTuple):
    """Mode and owner of a file that this process makes with mode 600."""

    st_mode: int = 0
    st_uid: int | None = None


@cache
def _new_file(folder: Path) -> _NewFile:
    """Tries what ``folder`` makes of a new file; the defaults where none can be made.

    File systems of networks may rename users, and some of other systems (vfat, CIFS, WSL) have no
    modes and show one for all files: there others cannot be told from this process's user.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            status = os.fstat(file.fileno())
            return _NewFile(status.st_mode, status.st_uid)
    except OSError:
        return _NewFile()
