"""Errors that users see: mistakes in the options, and runs that fail or stop."""

from collections.abc import Callable, Iterable


class ConfigError(ValueError):
    """One or more mistakes in the options, one line each, found before training starts.

    ``on_all_ranks`` is true where every rank raises an equal error; then one rank reports it.
    """

    on_all_ranks: bool = False

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


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
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


class OutputClosedError(RunError):
    """Nobody reads standard output any more."""


class Stopped(RunError):
    """A signal stopped the run after a whole round, which is saved if the run has a folder."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, on_all_ranks=True)
        self.signal = signal


def format_option_error(option: str, value: object, allowed: str, remedy: str) -> str:
    """Returns one line: the option, the given value, the allowed values, and a remedy."""
    return f"{option}={value}: allowed is {allowed}; {remedy}"


def one_line(error: BaseException) -> str:
    """Returns type and message of ``error`` on one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


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
