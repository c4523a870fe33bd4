"""Whose a file is: what another user may have written is not obeyed without the user's word."""

import os
import stat
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from .reading import FileError, raise_unreadable, unusable


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
    if status.st_mode & stat.S_IWOTH:
        return "every user can write it"
    if status.st_uid not in (0, os.geteuid()) and status.st_uid != _owner_of_new(path.parent):
        return f"it belongs to another user (number {status.st_uid})"
    return ""


@cache
def _owner_of_new(folder: Path) -> int | None:
    """Returns who owns what this process writes; file systems of networks may rename users."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None


__all__ = ["FileError", "check"]
