"""Cost of checkpoints for a round: none, one written beside the next round, one waited for.

    torchrun --nproc-per-node 2 tools/bench_checkpoint.py clients=10 algorithm=fedbn
    mpirun -n 2 python tools/bench_checkpoint.py model=resnet20 data=synthetic

repeats=N       counted rounds of each kind, alternating (default 15)

All other words are options of the job, which keeps its files in a temporary folder.  Prints JSON:
seconds of a round of each kind (medians over the repeats), seconds to write a checkpoint, and its
bytes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import benchmark
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env

if TYPE_CHECKING:
    from fedtan_hpc.runtime.device import DevicePlacement

OPTIONS = ("repeats",)
KINDS = ("none", "beside", "waiting")


def run(words: Sequence[str]) -> None:
    """Times all kinds of rounds, and prints."""
    tool_options, job_words = options.split(words, OPTIONS)
    config = options.composed(job_words)
    repeats = benchmark.repeats(tool_options, 15)
    check(config)
    from fedtan_hpc.distributed.collectives import broadcast_object  # loads torch

    [placement] = benchmark.placements(config, [str(config.comm.backend)])
    is_first = launcher_env.rank_hint() == 0
    with benchmark.process_group(config, placement), ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if is_first else ""
        results = measure(config, placement, Path(broadcast_object(folder)), repeats)
    if is_first:
        setting = benchmark.setting(
            config,
            clients=config.clients,
            algorithm=str(config.algorithm.name),
            model=config.model.name,
            repeats=repeats,
        )
        print(json.dumps({"setting": setting, **results}))


def measure(
    config: Config, placement: DevicePlacement, folder: Path, repeats: int
) -> dict[str, Any]:
    """Times rounds of the job, each with a checkpoint of one kind, in turn."""
    from fedtan_hpc.distributed import process_group
    from fedtan_hpc.evaluation.callbacks import RunInfo
    from fedtan_hpc.job import checkpoint_format
    from fedtan_hpc.job.checkpoint_writer import CheckpointWriter
    from fedtan_hpc.job.setup import prepare

    benchmark.prepare_process(config)
    config.rounds, config.eval_every = 10**6, 10**6
    trainer = prepare(config, placement)
    (folder / "rounds.jsonl").touch()
    writer = CheckpointWriter(trainer.cohort)
    writer.run_began(RunInfo(config, folder, 0))
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    writing = []
    number = 0
    for repeat in range(repeats + 1):  # the first is a warm-up
        for kind in KINDS:
            number += 1
            process_group.barrier()
            start = time.perf_counter()
            if kind != "none" and number > 1:
                writer.save(number)
            if kind == "waiting":
                writer.wait()
                writing.append(time.perf_counter() - start)
            trainer.round(number)
            seconds[kind].append(time.perf_counter() - start)
            writer.wait()
        benchmark.show_progress(repeat, repeats)
    writer.run_failed(None)
    counted = {kind: times[1:] for kind, times in seconds.items()}
    newest = checkpoint_format.existing(folder)[:1]
    files = [file for path in newest for file in path.parent.glob(f"{path.stem}.*")]
    size = sum(file.stat().st_size for file in files)  # with all ranks' shards
    process_group.barrier()
    return {
        "seconds_a_round": {kind: statistics.median(times) for kind, times in counted.items()},
        "seconds_to_write": statistics.median(writing[1:]),
        "bytes": size,
        "spread": {kind: [min(times), max(times)] for kind, times in counted.items()},
    }


if __name__ == "__main__":
    benchmark.main("bench_checkpoint", __doc__, run)
