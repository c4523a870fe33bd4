"""What all benchmarks share: the start, options, backends to alternate, and printing.

Used by the benchmarks in ``tools/`` and by ``scaling``.  Nothing here loads torch before it is
needed, so that mistakes in the options are reported at once.
"""

from __future__ import annotations

import json
import platform
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedtan_hpc import cli
from fedtan_hpc.config.enums import BackendName
from fedtan_hpc.config.errors import ConfigError, format_option_error, shown
from fedtan_hpc.config.schema import CommConfig, Config
from fedtan_hpc.config.validation.bounds import Bound
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env

if TYPE_CHECKING:
    from fedtan_hpc.runtime.device import DevicePlacement

DEFAULTS = ["data=synthetic", "data.shape=[3,32,32]", "model=resnet20", "optimizer.momentum=0.9"]
"""Options of the job that bench_round and bench_memory set, unless an experiment is named."""
_MOST = 1_000_000
"""Most ranks, images and other things that a tool counts."""
_MOST_REPEATS = 1000


def with_defaults(defaults: Sequence[str], words: Sequence[str]) -> list[str]:
    """Returns the job's words after the defaults, which an experiment replaces."""
    is_experiment = any(word.lstrip("+").startswith("experiment=") for word in words)
    return [*([] if is_experiment else defaults), *words]


def main(name: str, help_text: str | None, run: Callable[[Sequence[str]], None]) -> None:
    """Calls ``run`` with the command line's words, or prints ``help_text`` for ``--help``.

    The process ends with the exit codes of ``python -m fedtan_hpc``.
    """
    with cli.exit_codes(name):
        words = sys.argv[1:]
        if not options.shows_help(words, help_text):
            run(words)


def prepare_process(config: Config, keeps_memory: bool = True) -> None:
    """Sets threads, malloc and TF32 of this process as the job of ``config`` does."""
    import torch

    from fedtan_hpc.runtime import device, malloc

    torch.set_num_threads(config.threads or 1)
    if keeps_memory:
        malloc.keep_freed_memory()
    device.allow_tensor_float(config.tf32)


def placements(config: Config, backends: Sequence[str]) -> list[DevicePlacement]:
    """Returns this rank's placement for each value of ``comm.backend``; equal ones are merged."""
    from fedtan_hpc.runtime import device

    info, by_backend = launcher_env.detect(), {}
    for name in backends:
        comm = CommConfig(backend=BackendName(name), timeout_seconds=config.comm.timeout_seconds)
        placement = device.choose(replace(config, comm=comm), info)
        by_backend[placement.backend] = placement
    return list(by_backend.values())


@contextmanager
def process_group(config: Config, placement: DevicePlacement) -> Iterator[None]:
    """Starts the process group of all ranks, and stops it; without a launcher there is none."""
    import torch

    from fedtan_hpc.distributed import process_group

    info = launcher_env.detect()
    if placement.device.type == "cuda":
        torch.cuda.set_device(placement.device)
    if info.launcher == "none":
        yield
        return
    process_group.start(info.rank, info.world_size, placement.backend, config.comm.timeout_seconds)
    yield
    process_group.stop()


def alternate(
    config: Config, backends: Sequence[str], repeats: int
) -> Iterator[tuple[DevicePlacement, bool]]:
    """Yields each backend's placement, its process group started, and whether the turn counts.

    The first turn of each backend is a warm-up and does not count.
    """
    for repeat in range(repeats + 1):
        for placement in placements(config, backends):
            with process_group(config, placement):
                yield placement, repeat > 0
        show_progress(repeat, repeats)


def backends(tool_options: Mapping[str, str]) -> list[str]:
    """Returns the value of ``backends=[...]``; raises ``ConfigError`` for an unknown one."""
    known = [str(name) for name in BackendName]
    return choices(tool_options.get("backends", "backends=[auto]"), known, "[mpi,gloo]")


def choices(word: str, known: Sequence[str], example: str) -> list[str]:
    """Returns the names in ``name=[a,b]``; raises ``ConfigError`` for one that is not known."""
    values = options.values(word, example)
    names = [str(name).lower() if isinstance(name, bool) else str(name) for name in values]
    if unknown := [name for name in names if name not in known]:
        option, remedy = word.partition("=")[0], "choose some of these"
        raise ConfigError(format_option_error(option, unknown[0], " | ".join(known), remedy))
    return names


def whole_numbers(word: str, example: str, most: int = _MOST) -> list[int]:
    """Returns the numbers in ``name=[a,b]``; raises ``ConfigError`` unless they are 1 to ``most``.

    ``example`` is for the remedy.
    """
    option, numbers = word.partition("=")[0], options.values(word, example)
    bound = Bound(1, most, example)
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not bound.contains(number):
            remedy = f"for example {option}={example}"
            raise ConfigError(format_option_error(option, number, str(bound), remedy))
    return numbers


def whole_number(word: str, example: str, most: int = _MOST) -> int:
    """Returns the number in ``name=3``; raises ``ConfigError`` unless it is one from 1 to ``most``.

    ``example`` is for the remedy.
    """
    numbers = whole_numbers(word, example, most)
    if len(numbers) > 1:
        option, allowed = word.partition("=")[0], "a single whole number"
        remedy = f"for example {option}={example}"
        raise ConfigError(format_option_error(option, numbers, allowed, remedy))
    return numbers[0]


def count(text: str) -> int:
    """Returns the number that an option of argparse gives, if it is one from 1 to ``_MOST``."""
    if not options.is_count(text, _MOST):
        raise ArgumentTypeError(f"{shown(text)}: allowed is {Bound(1, _MOST, 1)}")
    return int(text)


def repeats(tool_options: Mapping[str, str], default: int) -> int:
    """Returns the value of ``repeats=N``; raises ``ConfigError`` unless it is 1 to 1000."""
    word = tool_options.get("repeats", f"repeats={default}")
    return whole_number(word, str(default), _MOST_REPEATS)


def compiling(tool_options: Mapping[str, str]) -> list[bool]:
    """Returns the value of ``compile=[...]``; raises ``ConfigError`` unless it is true or false."""
    word = tool_options.get("compile", "compile=[false]")
    return [name == "true" for name in choices(word, ["false", "true"], "[false,true]")]


def show_progress(repeat: int, repeats: int) -> None:
    """Overwrites the line of progress on rank 0's terminal."""
    if launcher_env.rank_hint() == 0:
        end = "\r" if repeat < repeats else "\n"
        print(f"repeat {repeat} of {repeats}", end=end, file=sys.stderr, flush=True)


def setting(config: Config, **more: Any) -> dict[str, Any]:
    """Returns ``more`` with the ranks, threads, hardware and versions of this run."""
    import torch

    from fedtan_hpc.job import summary

    info = launcher_env.detect()
    on_gpu = torch.cuda.is_available() and str(config.device) != "cpu"
    return {
        **more,
        "ranks": info.world_size,
        "launcher": info.launcher,
        "threads": config.threads or 1,
        "machine": summary.machine(torch.device("cuda" if on_gpu else "cpu")),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def print_table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Prints a Markdown table on standard error; ``columns`` maps heads to formats of a row."""
    cells_of = [[cell.format(**row) for cell in columns.values()] for row in rows]
    for cells in (columns, ["---"] * len(columns), *cells_of):
        print(f"| {' | '.join(cells)} |", file=sys.stderr)


def print_json(
    setting: Mapping[str, Any], results: Sequence[Mapping[str, Any]], **more: Any
) -> None:
    """Prints setting and results, and ``more`` by name, as one JSON object on standard output."""
    print(json.dumps({"setting": setting, "results": results, **more}))
