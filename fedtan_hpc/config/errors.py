"""Errors that users see: mistakes in the options, and runs that fail or stop.

What an error says is one printable line, because it cites values of users and of files: the lines
of ``ConfigError``, ``RunError`` and ``one_line`` go through ``printable``.
"""

from collections.abc import Callable, Iterable
from reprlib import Repr

_CUT = " ... "
"""What stands in a line for the part that is cut out."""
_MOST_OF_A_LINE = 3000
"""Characters of a message; the longest list of allowed values has about 1,500."""
_MOST_OF_AN_ERROR = 300
"""Characters of an exception that a message cites."""
_MOST_OF_A_VALUE = 200
"""Characters of a value."""
_MOST_DIGITS = 100
"""Digits of a whole number."""


def printable(text: object, most: int = _MOST_OF_A_LINE) -> str:
    """Returns ``text`` on one line of at most ``most`` characters; a longer one loses its middle.

    Line breaks, control characters, marks of the writing direction, surrogates and all else that
    is not printable become escapes such as ``\\x1b``.  What is a printable line stays as it is.
    """
    line = str(text)
    parts = [line] if len(line) <= most else [line[:most], line[-most:]]
    escaped = ["".join(c if c.isprintable() else _escape(c) for c in part) for part in parts]
    if len(escaped) == 1 and len(escaped[0]) <= most:
        return escaped[0]
    half = (most - len(_CUT)) // 2
    return escaped[0][:half] + _CUT + escaped[-1][-half:]


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class ConfigError(ValueError):
    """One or more mistakes in the options, one line each, found before training starts.

    ``on_all_ranks`` is true where every rank raises an equal error; then one rank reports it.
    """

    on_all_ranks: bool = False

    def __init__(self, *mistakes: str) -> None:
        self.mistakes = tuple(map(printable, mistakes))
        super().__init__("\n".join(self.mistakes))


class LauncherError(ConfigError):
    """The launcher did not start the ranks correctly; each rank finds this out by itself."""

    on_all_ranks = True


class FolderInUseError(ConfigError):
    """Another process writes the folder of the run."""


class RunError(RuntimeError):
    """A failure during a run; the message names the round and the rank or client.

    ``on_all_ranks`` is true where every rank raises an equal error; then one rank reports it.
    """

    def __init__(self, message: str, on_all_ranks: bool) -> None:
        super().__init__(printable(message))
        self.on_all_ranks = on_all_ranks


class OutputClosedError(RunError):
    """Nobody reads standard output any more."""


class Stopped(RunError):
    """A signal stopped the run after a whole round, which is saved if the run has a folder."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, on_all_ranks=True)
        self.signal = signal


def format_option_error(option: str, value: object, allowed: str, remedy: str) -> str:
    """Returns one printable line: option, given value (shortened), allowed values, and a remedy."""
    return printable(f"{printable(option, 200)}={shown(value)}: allowed is {allowed}; {remedy}")


def shown(value: object) -> str:
    """Returns ``value`` for a message: printable, and shortened where it is long or nested."""
    if not isinstance(value, str) and isinstance(value, list | tuple | dict | set | int):
        value = _Shortened().repr(value)
    return printable(value, _MOST_OF_A_VALUE)


class _Shortened(Repr):
    """Shows a few elements of collections, and whole numbers that Python refuses to print."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 20
        self.maxstring = self.maxother = _MOST_DIGITS

    def repr_int(self, value: int, level: int) -> str:
        """Returns the digits, or how many there are."""
        digits = value.bit_length() * 30103 // 100000 + 1
        return f"(about {digits} digits)" if digits > _MOST_DIGITS else repr(value)


def one_line(error: BaseException) -> str:
    """Returns type and message of ``error`` on one printable line of at most 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return printable(text, _MOST_OF_AN_ERROR)


def check_together(checks: Iterable[Callable[[], None]]) -> None:
    """Makes all checks; raises one ``ConfigError`` with all their mistakes, equal ones once."""
    mistakes: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except ConfigError as error:
            mistakes |= dict.fromkeys(error.mistakes)
    if mistakes:
        raise ConfigError(*mistakes)
