"""Time and memory of streamed images: a round of the job against torch's DataLoader, in one run.

    python tools/bench_loading.py
    python tools/bench_loading.py model=resnet20 data.image_size=64 workers=[1]

workers=[...]   processes that read images (default [1,2])
images=N        JPEG files of 320x280 pixels to make (default 600); not with data.root
repeats=N       counted turns of each way, alternating (default 9)

All other words are options of the job.  There is one client on one rank.  The default network is so
small that loading is the bound.  Images are cut at random, scaled to data.image_size (default 224),
mirrored and normalised.  Ways:

    plain     torchvision's ImageFolder and v2 transforms, torch's DataLoader with persistent
              workers, torch's BN and SGD
    streamed  rounds of this package, with data.loading=stream

A turn takes E = local_steps steps twice, and the second time counts: by then the batches that were
read before the turn are used up.  The next turn begins when all workers are idle.  Peaks of memory
are of a process for each way.  Prints JSON, and a table on standard error.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bench import benchmark
from fedtan_hpc.config.errors import RunError
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options

if TYPE_CHECKING:
    from bench.loaders import Way

OPTIONS = ("workers", "images", "repeats", "only")
_DEFAULTS = [
    "data=folder",
    "data.loading=stream",
    "data.image_size=224",
    "data.random_resized_crop=true",
    "data.flip=true",
    "data.normalisation=imagenet",
    "partition=iid",
    "optimizer.momentum=0.9",
    "local_steps=8",
    "clients=1",
    "rounds=1000000",
    "eval_every=1000000",
]
_TINY = ["model=import", "model.target=bench.loaders:tiny"]
_COLUMNS = {
    "way": "{way}",
    "workers": "{workers}",
    "images a second": "{images_per_second:.0f}",
    "ms a step": "{step_ms:.1f}",
    "to plain": "{to_plain:.3f}",
    "rank, MB": "{rank_MB:.0f}",
    "workers, MB": "{workers_MB:.0f}",
    "together, MB": "{together_MB:.0f}",
}


def run(words: Sequence[str]) -> None:
    """Measures both ways, or prints the peaks of one (``only=WAY``), whose process it is."""
    tool_options, job_words = options.split(words, OPTIONS)
    workers = benchmark.whole_numbers(tool_options.get("workers", "workers=[1,2]"), "[1,2]")
    images = benchmark.whole_number(tool_options.get("images", "images=600"), "600")
    repeats = benchmark.repeats(tool_options, 9)
    if not any(word.startswith("model=") for word in job_words):
        job_words = [*_TINY, *job_words]
    with _images(job_words, images) as root:
        words = [*job_words, f"data.root={root}"]
        configs = [_config(words, number) for number in workers]
        if "only" in tool_options:
            print(*peaks(configs[0], tool_options["only"].partition("=")[2]))
            return
        rows = [row for config in configs for row in measure(config, words, repeats)]
    benchmark.print_table(rows, _COLUMNS)
    benchmark.print_json(_setting(configs[0], repeats), rows)


@contextmanager
def _images(words: Sequence[str], images: int) -> Iterator[str]:
    """Yields the folder that ``data.root`` names, or one of new images."""
    if given := [word for word in words if word.startswith("data.root=")]:
        yield given[-1].partition("=")[2]
        return
    from bench import loaders

    with TemporaryDirectory() as folder:
        loaders.write_images(Path(folder), images)
        yield folder


def _config(words: Sequence[str], workers: int) -> Config:
    config = options.composed([*_DEFAULTS, *words])
    config.data = replace(config.data, workers=workers)
    check(config)
    return config


def _way(config: Config, name: str) -> Way:
    from bench import loaders  # torch loads here

    benchmark.prepare_process(config)
    [placement] = benchmark.placements(config, ["auto"])
    make = loaders.plain if name == "plain" else loaders.streamed
    return make(config, placement)


def measure(config: Config, words: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Returns a row for each way: its time, the ratio to plain, and its memory."""
    from bench import processes, timing  # torch loads here

    [placement] = benchmark.placements(config, ["auto"])
    ways = {name: _way(config, name) for name in ("plain", "streamed")}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            way.run()
            seconds[name].append(timing.seconds(way.run, placement.device))
            processes.wait_until_idle()
        benchmark.show_progress(repeat, repeats)
    for way in ways.values():
        way.close()
    return [
        _row(name, config, seconds[name][1:], seconds["plain"][1:])
        | _peaks_of_a_process(name, config, words)
        for name in ways
    ]


def _row(
    name: str, config: Config, times: Sequence[float], plain: Sequence[float]
) -> dict[str, Any]:
    step = statistics.median(times) / config.local_steps
    return {
        "way": name,
        "workers": config.data.workers,
        "images_per_second": config.batch_size / step,
        "step_ms": 1000 * step,
        "to_plain": statistics.median(a / b for a, b in zip(times, plain, strict=True)),
        "all_ms": [1000 * t for t in times],
    }


def _peaks_of_a_process(name: str, config: Config, words: Sequence[str]) -> dict[str, float]:
    command = [sys.executable, __file__, *words, f"workers=[{config.data.workers}]", f"only={name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{name}: {done.stderr.strip()}", on_all_ranks=True)
    numbers = [float(word) for word in done.stdout.split()[-3:]]
    return dict(zip(("rank_MB", "workers_MB", "together_MB"), numbers, strict=True))


def peaks(config: Config, name: str) -> tuple[float, float, float]:
    """Returns the peaks in MB of this process, of its workers, and of both together."""
    from bench import processes

    memory = processes.MemoryPeaks()
    memory.start()
    way = _way(config, name)
    for _ in range(3):
        way.run()
    memory.finish()
    way.close()
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    ]
    return int(line.split()[1]) * 1024 / 1e6, memory.workers / 1e6, memory.everything / 1e6


def _setting(config: Config, repeats: int) -> dict[str, Any]:
    return benchmark.setting(
        config,
        model=config.model.target or config.model.name,
        image_size=config.data.image_size,
        batch_size=config.batch_size,
        local_steps=config.local_steps,
        precision=str(config.precision),
        channels_last=config.channels_last,
        repeats=repeats,
    )


if __name__ == "__main__":
    benchmark.main("bench_loading", __doc__, run)
