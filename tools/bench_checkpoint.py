"""What saving costs a round: without checkpoints, with one beside the next round, and waited for.

    torchrun --nproc-per-node 2 tools/bench_checkpoint.py clients=10 algorithm=fedbn
    mpirun -n 2 python tools/bench_checkpoint.py model=resnet20 data=synthetic

repeats=N       rounds of each way that count, alternating (default 15)

All other words are options of the job, which keeps its files in a folder of its own for a while.
Prints JSON: seconds of a round by way (medians over the repeats), seconds that a checkpoint takes
to be written, and its bytes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import benchmark
from bench.benchmark import Carrier

from fedtan_hpc.config.schema import Config, to_dict
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env

WAYS = ("none", "beside", "waiting")


def main() -> None:
    """Time the ways and print."""
    benchmark.command("bench_checkpoint", __doc__, ("repeats",), _time)


def _time(own: Mapping[str, str], job: list[str]) -> None:
    config = options.composed(job)
    repeats = benchmark.repeats(own, 15)
    check(config)
    [carrier] = benchmark.carriers(config, [str(config.comm.backend)])
    with carrier.started(config), tempfile.TemporaryDirectory() as folder:
        results = measure(config, carrier, Path(folder), repeats)
    if launcher_env.rank_hint() == 0:
        setting = benchmark.setting(
            config,
            clients=config.clients,
            algorithm=str(config.algorithm.name),
            model=config.model.name,
            repeats=repeats,
        )
        print(json.dumps({"setting": setting, **results}))


def measure(config: Config, carrier: Carrier, folder: Path, repeats: int) -> dict[str, Any]:
    """Rounds of the job, each followed by a checkpoint in one of the ways, in turn."""

    from fedtan_hpc.distributed import process_group
    from fedtan_hpc.job import checkpoint_format
    from fedtan_hpc.job.checkpoint_writer import CheckpointWriter
    from fedtan_hpc.job.setup import prepare
    from fedtan_hpc.runtime.device import DevicePlacement

    benchmark.settle(config)
    config.rounds, config.eval_every = 10**6, 10**6
    trainer = prepare(config, DevicePlacement(carrier.device, carrier.backend))
    (folder / "rounds.jsonl").touch()
    facts = {"config": to_dict(config), "resumed_after": []}
    keeper = CheckpointWriter(folder, config.checkpoint, facts)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    writing = []
    number = 0
    for repeat in range(repeats + 1):  # the first warms up
        for way in WAYS:
            number += 1
            process_group.barrier()
            begun = time.perf_counter()
            if way != "none" and number > 1:
                keeper.save(number, trainer.cohort)
            if way == "waiting":
                keeper.wait()
                writing.append(time.perf_counter() - begun)
            trainer.round(number)
            seconds[way].append(time.perf_counter() - begun)
            keeper.wait()
        benchmark.tell(repeat, repeats)
    keeper.close()
    found = {way: statistics.median(times[1:]) for way, times in seconds.items()}
    size = sum(path.stat().st_size for path in checkpoint_format.existing(folder)[:1])
    process_group.barrier()
    return {
        "seconds_a_round": found,
        "seconds_to_write": statistics.median(writing[1:]),
        "bytes": size,
        "spread": {way: _spread(times[1:]) for way, times in seconds.items()},
    }


def _spread(times: Sequence[float]) -> list[float]:
    """Least and most."""
    return [min(times), max(times)]


if __name__ == "__main__":
    main()
