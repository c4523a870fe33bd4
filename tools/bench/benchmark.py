"""What the benchmarks share: their options, the carriers they alternate, and what they ran on."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fedtan_hpc import cli
from fedtan_hpc.config.enums import BackendName
from fedtan_hpc.config.errors import ConfigError, format_option_error
from fedtan_hpc.config.schema import CommConfig, Config
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env


def command(
    name: str,
    text: str | None,
    names: Sequence[str],
    body: Callable[[Mapping[str, str], list[str]], None],
) -> None:
    """Run ``body`` with the tool's options ``names`` and the words of the job, or show ``text``.

    The process ends as all commands of the package do.
    """
    with cli.exit_codes(name):
        words = sys.argv[1:]
        if not options.shows_help(words, text):
            body(*options.split(words, names))


def settle(config: Config, keeps_memory: bool = True) -> None:
    """Let this process compute as the job of ``config`` would: threads, freed memory, TF32."""
    import torch

    from fedtan_hpc.runtime import device, malloc

    torch.set_num_threads(config.threads or 1)
    if keeps_memory:
        malloc.keep_freed_memory()
    device.allow_tensor_float(config.tf32)


@dataclass(frozen=True)
class Carrier:
    """A backend of torch.distributed, and the device on which this rank's messages are."""

    backend: str
    device: Any

    @contextmanager
    def started(self, config: Config) -> Iterator[None]:
        """All ranks as a process group; without a launcher there is none."""
        import torch

        from fedtan_hpc.distributed import process_group

        info = launcher_env.detect()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if info.launcher == "none":
            yield
            return
        process_group.start(info.rank, info.world_size, self.backend, config.comm.timeout_seconds)
        yield
        process_group.stop()


def carriers(config: Config, backends: Sequence[str]) -> list[Carrier]:
    """Those that ``comm.backend=...`` means here, each once."""
    from fedtan_hpc.runtime import device

    info, found = launcher_env.detect(), {}
    for name in backends:
        comm = CommConfig(backend=BackendName(name), timeout_seconds=config.comm.timeout_seconds)
        place = device.choose(replace(config, comm=comm), info)
        found[place.backend] = Carrier(place.backend, place.device)
    return list(found.values())


def turns(config: Config, backends: Sequence[str], repeats: int) -> Iterator[tuple[Carrier, bool]]:
    """Each carrier, started, in turn, and whether this turn counts: the first of each warms up."""
    for repeat in range(repeats + 1):
        for carrier in carriers(config, backends):
            with carrier.started(config):
                yield carrier, repeat > 0
        tell(repeat, repeats)


def backends(own: Mapping[str, str]) -> list[str]:
    """``backends=[...]``."""
    names = [str(name) for name in BackendName]
    asked = options.values(own.get("backends", "backends=[auto]"), "[mpi,gloo]")
    if wrong := [name for name in asked if name not in names]:
        raise ConfigError(
            format_option_error("backends", wrong[0], " | ".join(names), "choose some of these")
        )
    return asked


def repeats(own: Mapping[str, str], usual: int) -> int:
    """``repeats=N``."""
    [number] = options.values(own.get("repeats", f"repeats={usual}"), str(usual))[:1]
    if not isinstance(number, int) or number < 1:
        remedy = f"set repeats={usual}"
        raise ConfigError(format_option_error("repeats", number, "a whole number >= 1", remedy))
    return number


def tell(repeat: int, repeats: int) -> None:
    """How far it is, on rank 0's terminal."""
    if launcher_env.rank_hint() == 0:
        end = "\r" if repeat < repeats else "\n"
        print(f"repeat {repeat} of {repeats}", end=end, file=sys.stderr, flush=True)


def setting(config: Config, **own: Any) -> dict[str, Any]:
    """What was run on what."""
    import torch

    from fedtan_hpc.job import summary

    info = launcher_env.detect()
    on_gpu = torch.cuda.is_available() and str(config.device) != "cpu"
    return {
        **own,
        "ranks": info.world_size,
        "launcher": info.launcher,
        "threads": config.threads or 1,
        "machine": summary.machine(torch.device("cuda" if on_gpu else "cpu")),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
