"""Reading that the ranks share, and mistakes that all of them raise.  Used by ``datasets``."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from ...config.errors import ConfigError, format_option_error
from ...config.schema import DataConfig
from ...distributed import collectives, process_group
from ...runtime import launcher_env
from ..partition import Indices
from .items import DataError


def shared(
    config: DataConfig,
    function: Callable[[Indices], list[Any]],
    indices: Indices,
    what: str,
    on_all: bool = False,
) -> list[Any]:
    """Returns the values of ``function`` at ``indices``, of which each rank computes a part.

    ``on_all`` ranks compute all of them, and return their own.  An error of any rank is raised on
    all of them.  Long work shows its progress: ``what`` is being done.
    """
    rank, ranks = process_group.rank(), process_group.world_size()
    part = indices if on_all else np.array_split(indices, ranks)[rank]
    values: list[Any] = []
    mistake: DataError | None = None
    try:
        values = _with_progress(function, part, what if rank == 0 else "")
    except DataError as error:
        mistake = error
    gathered = collectives.all_gather_object((values if not on_all else [], mistake))
    for _, found in gathered:
        if found:
            raise unreadable(config, found)
    return values if on_all else [value for part_values, _ in gathered for value in part_values]


def _with_progress(
    function: Callable[[Indices], list[Any]], indices: Indices, what: str
) -> list[Any]:
    chunks = np.array_split(indices, max(1, min(100, len(indices) // 16)))
    console = Console(file=sys.stderr)
    is_quiet = not what or not launcher_env.writes_to_terminal()
    bar = track(chunks, description=what, console=console, transient=True, disable=is_quiet)
    return [value for chunk in bar for value in function(chunk)]


def unreadable(config: DataConfig, error: DataError) -> ConfigError:
    """Returns the error for a sample that cannot be used, found before training."""
    return error_of(config, "data whose samples can be read", str(error))


def error_of(config: DataConfig, allowed: str, found: str) -> ConfigError:
    """Returns the error that all ranks raise for what was ``found`` in the data."""
    option = "data.root" if config.target is None else "data.target"
    value = config.root if config.target is None else config.target
    return on_all_ranks(ConfigError(format_option_error(option, value, allowed, found)))


def on_all_ranks(error: ConfigError) -> ConfigError:
    """Marks an error that every rank raises; returns it."""
    error.on_all_ranks = True
    return error
