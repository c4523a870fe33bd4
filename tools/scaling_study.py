"""Measure strong and weak scaling of the job: rounds a second, efficiency, and where time goes.

    python tools/scaling_study.py world_sizes=[1,2,4] methods=[fedtan,fedavg] model=cnn
    python tools/scaling_study.py world_sizes=[2,4,8] mode=weak launcher=slurm launch.partition=cpu

world_sizes=[...]  numbers of ranks (default [1,2])
mode=strong|weak   keep the number of all clients, or of the clients of each rank (default strong)
launcher=...       torchrun (default), mpirun or slurm; slurm takes launch.* as submit.py does
methods=[...]      algorithms (default [fedtan,fedavg,centralised])
repeats=N          runs of each point, alternating (default 3)
out=DIR            folder for the results (default scaling)

All other words are options of the job; ``clients`` is the number of all clients (strong) or of the
clients of each rank (weak).  Finished runs are kept, so that an interrupted study can go on.
Writes ``scaling.csv``, ``scaling.md`` and ``scaling.png``.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import benchmark
from fedtan_hpc.config.enums import AlgorithmName
from fedtan_hpc.config.errors import ConfigError, format_option_error
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options
from scaling import study_report, study_runs
from scaling.study_runs import Point

OPTIONS = ("world_sizes", "mode", "launcher", "methods", "repeats", "out")


@dataclass(frozen=True)
class Study:
    """The command line."""

    world_sizes: list[int]
    mode: str
    launcher: str
    methods: list[str]
    repeats: int
    out: Path
    clients: int
    """Number of all clients (strong), or of the clients of each rank (weak)."""
    job_words: list[str]
    launch_words: list[str]

    def points(self) -> Iterator[Point]:
        """Yields all runs, alternating between methods and numbers of ranks."""
        for repeat in range(self.repeats):
            for method in self.methods:
                for ranks in self.world_sizes:
                    clients = self.clients * (ranks if self.mode == "weak" else 1)
                    words = [*self.job_words, f"algorithm={method}", f"clients={clients}"]
                    folder = self.out / "runs" / f"{self.mode}-{method}-{ranks}ranks-{repeat}"
                    yield Point(method, ranks, clients, repeat, folder, words)


def run(words: Sequence[str]) -> None:
    """Runs the missing points, and writes the report."""
    study = plan(words)
    points = list(study.points())
    study_runs.run_all(points, study.launcher, study.launch_words)
    rows: list[dict[str, Any]] = []
    for method in study.methods:
        points_of_method = [point for point in points if point.method == method]
        rows += study_report.rows(points_of_method, study.mode)
    command = " ".join(["python tools/scaling_study.py", *sys.argv[1:]])
    study_report.write(rows, study.out, study.mode, command)
    print(f"files: {study.out}/scaling.md, scaling.png, scaling.csv")


def plan(words: Sequence[str]) -> Study:
    """Returns the study of the command line; raises ``ConfigError`` before anything runs."""
    tool_options, rest = options.split(words, OPTIONS)
    launch_words = [word for word in rest if word.startswith("launch.")]
    job_words = [word for word in rest if word not in launch_words]
    world_sizes = tool_options.get("world_sizes", "world_sizes=[1,2]")
    methods = tool_options.get("methods", "methods=[fedtan,fedavg,centralised]")
    study = Study(
        world_sizes=sorted(benchmark.whole_numbers(world_sizes, "[1,2,4]")),
        mode=_one_of(tool_options, "mode", ("strong", "weak")),
        launcher=_one_of(tool_options, "launcher", study_runs.LAUNCHERS),
        methods=benchmark.choices(
            methods, [str(name) for name in AlgorithmName], "[fedtan,fedavg]"
        ),
        repeats=benchmark.repeats(tool_options, 3),
        out=Path(options.folder(tool_options.get("out", "out=scaling"))),
        clients=options.composed(job_words).clients,
        job_words=job_words,
        launch_words=launch_words,
    )
    options.check_plotting()
    for point in replace(study, repeats=1).points():
        check(options.composed(point.words))
    study_runs.check_launcher(study.launcher, launch_words)
    options.check_writable(study.out / "scaling.md")
    return study


def _one_of(tool_options: Mapping[str, str], name: str, known: Sequence[str]) -> str:
    value = tool_options.get(name, f"{name}={known[0]}").partition("=")[2]
    if value not in known:
        remedy = "choose one of these"
        raise ConfigError(format_option_error(name, value, " | ".join(known), remedy))
    return value


if __name__ == "__main__":
    benchmark.main("scaling_study", __doc__, run)
