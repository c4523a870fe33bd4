"""The failures that users meet: a mistake in the configuration, and a run that cannot go on."""


class ConfigError(ValueError):
    """One or more mistakes in the configuration, one line each; found before any data loads.

    ``on_all_ranks``: every rank raises the same, so that one of them may speak for all.
    """

    on_all_ranks = False

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


class LauncherError(ConfigError):
    """A mistake in how the ranks were started, which each of them meets by itself."""

    on_all_ranks = True


class AgreedError(ConfigError):
    """A mistake that one rank has found and told the others."""

    on_all_ranks = True


class RunError(RuntimeError):
    """A failure in the middle of a run; the message names the round and the rank or client.

    ``on_all_ranks``: every rank raises the same, so that one of them may speak for all.
    """

    def __init__(self, message: str, on_all_ranks: bool) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


class Stopped(RunError):
    """A signal asked for the end; the round was finished and, if there is a folder, saved."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, on_all_ranks=True)
        self.signal = signal


def format_option_error(option: str, value: object, allowed: str, remedy: str) -> str:
    """One line: the option, the value given, what is allowed and what to do."""
    return f"{option}={value}: allowed is {allowed}; {remedy}"


def one_line(error: BaseException) -> str:
    """Return the kind and the message of ``error`` on one line, at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
