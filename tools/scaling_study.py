"""Strong and weak scaling of the job, measured: rounds a second, efficiency, where time goes.

    python tools/scaling_study.py world_sizes=[1,2,4] methods=[fedtan,fedavg] model=cnn
    python tools/scaling_study.py world_sizes=[2,4,8] mode=weak launcher=slurm launch.partition=cpu

world_sizes=[...]  numbers of ranks (default [1,2])
mode=strong|weak   clients in all, or clients of each rank, stay as many (default strong)
launcher=...       torchrun (default), mpirun or slurm; with slurm, launch.* as for submit.py
methods=[...]      algorithms (default [fedtan,fedavg,centralised])
repeats=N          runs of each point, alternating (default 3)
out=DIR            folder of the results (default scaling)

All other words are options of the job; ``clients`` counts those in all (strong), or those of a rank
(weak).  Finished runs are kept: an interrupted study goes on.  Writes ``scaling.csv``,
``scaling.md`` and ``scaling.png``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import benchmark
from scaling import launch as launching
from scaling import report

from fedtan_hpc import cli
from fedtan_hpc.config.enums import AlgorithmName
from fedtan_hpc.config.errors import ConfigError, format_option_error
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options

OWN = ("world_sizes", "mode", "launcher", "methods", "repeats", "out")
_MODES = ("strong", "weak")


@dataclass(frozen=True)
class Study:
    """What is asked for."""

    world_sizes: list[int]
    mode: str
    launcher: str
    methods: list[str]
    repeats: int
    out: Path
    clients: int
    """In all, or of each rank."""
    job: list[str]
    """Words of the job."""
    launch: list[str]
    """Words on its submission."""

    def points(self) -> Iterator[launching.Point]:
        """All runs, alternating."""
        for repeat in range(self.repeats):
            for method in self.methods:
                for ranks in self.world_sizes:
                    clients = self.clients * (ranks if self.mode == "weak" else 1)
                    name = f"{self.mode}-{method}-{ranks}ranks-{repeat}"
                    words = [*self.job, f"algorithm={method}", f"clients={clients}"]
                    folder = self.out / "runs" / name
                    yield launching.Point(method, ranks, clients, repeat, folder, words)


def main() -> None:
    """Run what is missing and write the report."""
    with cli.exit_codes("scaling_study"):
        if options.shows_help(sys.argv[1:], __doc__):
            return
        study = plan(sys.argv[1:])
        launching.run_all(list(study.points()), study.launcher, study.launch)
        write_report(study)


def plan(words: Sequence[str]) -> Study:
    """The study that the words ask for; raises ``ConfigError`` before anything runs."""
    own, rest = options.split(words, OWN)
    launch = [word for word in rest if word.startswith("launch.")]
    job = [word for word in rest if word not in launch]
    out = Path(options.folder(own.get("out", "out=scaling")))
    study = Study(
        world_sizes=_world_sizes(own.get("world_sizes", "world_sizes=[1,2]")),
        mode=_one_of(own, "mode", _MODES),
        launcher=_one_of(own, "launcher", launching.LAUNCHERS),
        methods=_methods(own.get("methods", "methods=[fedtan,fedavg,centralised]")),
        repeats=benchmark.repeats(own, 3),
        out=out,
        clients=options.composed(job).clients,
        job=job,
        launch=launch,
    )
    options.check_plotting()
    for point in study.points():
        check(options.composed(point.words))
    launching.check_launcher(study.launcher, launch)
    options.check_writable(out / "scaling.md")
    return study


def _world_sizes(word: str) -> list[int]:
    sizes = options.values(word, "[1,2,4]")
    if wrong := [size for size in sizes if not isinstance(size, int) or size < 1]:
        allowed = "whole numbers >= 1"
        raise ConfigError(
            format_option_error("world_sizes", wrong[0], allowed, "for example [1,2,4]")
        )
    return sorted(sizes)


def _methods(word: str) -> list[str]:
    known = [str(name) for name in AlgorithmName]
    methods = [str(method) for method in options.values(word, "[fedtan,fedavg]")]
    if wrong := [method for method in methods if method not in known]:
        raise ConfigError(
            format_option_error("methods", wrong[0], " | ".join(known), "choose some of these")
        )
    return methods


def _one_of(own: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    chosen = own.get(name, f"{name}={choices[0]}").partition("=")[2]
    if chosen not in choices:
        raise ConfigError(
            format_option_error(name, chosen, " | ".join(choices), "choose one of these")
        )
    return chosen


def write_report(study: Study) -> None:
    """Write table and picture of all points."""
    rows: list[dict[str, Any]] = []
    for method in study.methods:
        of_method = [point for point in study.points() if point.method == method]
        rows += report.rows(of_method, study.mode)
    command = " ".join(["python tools/scaling_study.py", *sys.argv[1:]])
    report.write(rows, study.out, study.mode, command)
    print(f"files: {study.out}/scaling.md, scaling.png, scaling.csv")


if __name__ == "__main__":
    main()
