"""The one way to read a file of a run, a comparison or a data set: doubted and bounded.

A file is opened only if it is a regular one, so nothing waits for the other end of a FIFO and no
device is touched.  Every size is bounded.  What is wrong ends in one line that names the file.
"""

import errno
import gzip
import json
import math
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import yaml
from omegaconf import OmegaConf

from ..config.errors import ConfigError, one_line

TEXT_BYTES = 2**24
"""Largest text file or line, 16 MiB."""
LINES_BYTES = 2**31
"""Largest file of lines, such as rounds.jsonl."""
_YAML_EVENTS = 100_000
_YAML_DEPTH = 50
_KINDS = {
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_NOT_FILES = (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Errors of opening that do not pass by themselves."""


class FileError(ConfigError):
    """A file that is there and cannot be used; the line names it, what is wrong and a remedy."""


class UnreadableFileError(FileError):
    """The system refuses to read a file; it may be whole."""


def unusable(path: Path, why: str, remedy: str = "mend or remove it") -> FileError:
    """Returns the error of a file with the reason ``why``, as one line."""
    return FileError(f"{path}: {why}; {remedy}")


@contextmanager
def opened(path: Path, most: int | None = None) -> Iterator[BinaryIO]:
    """Opens a regular file of at most ``most`` bytes to read; never waits for another process.

    Raises ``FileNotFoundError`` if there is none, ``UnreadableFileError`` if the system refuses,
    and ``FileError`` for anything but a file, or one that is too large.
    """
    try:
        check_regular(path, os.stat(path))  # before it is opened, which some devices notice
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise_unreadable(path, error)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        check_regular(path, status)
        _check_size(path, status.st_size, most)
        try:
            yield file
        except FileError:
            raise
        except OSError as error:
            raise_unreadable(path, error)


def check_file(path: Path, most: int) -> None:
    """Raises ``FileError`` unless ``path`` is a file of at most ``most`` bytes that can be read."""
    with opened(path, most):
        pass


def check_regular(path: Path, status: os.stat_result) -> None:
    """Raises ``FileError`` unless the status is that of a regular file."""
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "of an unknown kind")
        raise unusable(path, f"it is {kind} and not a regular file", "remove or rename it")


def raise_unreadable(path: Path, error: Exception) -> NoReturn:
    """Raises ``FileError`` for a name that cannot be a file's, else ``UnreadableFileError``."""
    reason = getattr(error, "strerror", None) or one_line(error)
    if not isinstance(error, OSError) or error.errno in _NOT_FILES:
        raise unusable(path, f"it cannot be opened ({reason})", "remove or rename it") from error
    line = f"{path}: it cannot be read ({reason}); try again later"
    raise UnreadableFileError(line) from error


def _check_size(path: Path, size: int, most: int | None) -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = machine if most is None else most
    if size > limit:
        raise unusable(path, f"it has {size} bytes, and at most {limit} can be read")


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """Returns the content of a file; by default it must fit in the machine's memory."""
    try:
        with opened(path, most) as file:
            return file.read()
    except MemoryError as error:
        line = f"{path}: it does not fit in memory; use a machine with more"
        raise UnreadableFileError(line) from error


def read_inflated(path: Path, most: int) -> bytes:
    """Returns the content of a file, of a .gz file what it inflates to: at most ``most`` bytes."""
    if path.suffix != ".gz":
        return read_bytes(path, most)
    with opened(path) as file, gzip.open(file) as inflated:
        try:
            content = inflated.read(most + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise unusable(path, f"it is damaged ({error})", "copy it again") from error
    if len(content) > most:
        why = f"it inflates to more than the {most} bytes that it may have"
        raise unusable(path, why, "copy it again")
    return content


def read_text(path: Path) -> str:
    """Returns the content of a small text file in UTF-8."""
    return _decoded(path, read_bytes(path, TEXT_BYTES))


def _decoded(path: Path, content: bytes, where: str = "") -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise unusable(path, f"{where}it is not UTF-8 text (byte {error.start})") from error


def last_line(path: Path) -> str:
    """Returns the last line with words among the last 64 KiB of a text file; empty if none."""
    with opened(path, LINES_BYTES) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 2**16))
        text = file.read(2**16).decode("utf-8", "replace")
    return next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "")


def read_json(path: Path) -> Any:
    """Returns the value in a JSON file; numbers are finite."""
    return parsed(path, read_text(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise unusable(path, f"it is a JSON {type(value).__name__}, not an object")
    return value


def parsed(path: Path, text: str, where: str = "") -> Any:
    """Returns the value of a JSON text from ``path``; ``where`` begins the reason of an error."""
    try:
        return json.loads(text, parse_constant=_refused, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise unusable(path, f"{where}it is not valid JSON ({one_line(error)})") from error


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    if math.isfinite(value := float(text)):
        return value
    raise ValueError(f"{text} is too large")


def lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file, with their ends; none if there is no file."""
    with suppress(FileNotFoundError), opened(path, LINES_BYTES) as file:
        while line := file.readline(TEXT_BYTES + 1):
            if len(line) > TEXT_BYTES:
                raise unusable(path, f"a line has more than {TEXT_BYTES} bytes")
            yield line


def json_line(path: Path, line: bytes, number: int) -> Any:
    """Returns the value of the line with this ``number``, from 1, of a file of JSON lines."""
    where = f"line {number}: "
    return parsed(path, _decoded(path, line, where), where)


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file, without aliases and interpolations, as plain values."""
    text = read_text(path)
    try:
        _check_events(path, text)
        values = OmegaConf.to_container(OmegaConf.create(text))
    except FileError:
        raise
    except Exception as error:  # OmegaConf raises many kinds, assertions too
        raise unusable(path, f"it is not valid YAML ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise unusable(path, "it is no mapping of options to values")
    if not text.endswith("\n"):
        raise unusable(path, "its last line has no end, so it may be incomplete")
    if "${" in text and _has_interpolation(values):
        raise unusable(path, "a value has ${...}, which a run does not write")
    return {str(key): value for key, value in values.items()}


def _check_events(path: Path, text: str) -> None:
    """Raises ``FileError`` for a YAML text that would grow when it is read."""
    depth = 0
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for number, event in enumerate(yaml.parse(text, Loader=loader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise unusable(path, "it has an alias or anchor, which a run does not write")
        if number > _YAML_EVENTS or depth > _YAML_DEPTH:
            raise unusable(path, "it is too large or too deep for options")


def _has_interpolation(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_interpolation(each) for each in (*value, *value.values()))
    if isinstance(value, list):
        return any(_has_interpolation(each) for each in value)
    return isinstance(value, str) and "${" in value
