"""The whole job: options in, a trained model and its summary out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config.errors import AgreedError, ConfigError, RunError, Stopped
from ..config.hydra_errors import typed
from ..config.schema import Config, to_dict
from ..config.validate import check
from ..data.download import fetch
from ..distributed import collectives, process_group
from ..distributed.watchdog import Watchdog
from ..evaluation.loggers import Display, RunLog, show_result
from ..evaluation.records import RoundCallback, RoundRecord, Summary
from ..runtime import device, launcher_env, malloc, signals
from ..runtime.device import DevicePlacement, tensor_float
from ..runtime.launcher_env import RankInfo
from ..runtime.signals import StopRequest
from . import dry_run, resume, run_dir
from .checkpoint_writer import CheckpointWriter
from .resume import Resumption
from .setup import prepare
from .summary import backend, save_models, summarise
from .trainer import Trainer


def check_all(configs: Sequence[Config]) -> None:
    """Find the mistakes of all runs of a sweep before the first begins: networks and files.

    The first rank of each node looks for files; raises ``ConfigError``.
    """
    tried: set[str] = set()
    for config in configs:
        of_network = repr((config.model, config.data, config.algorithm))
        if of_network not in tried:
            dry_run.dry_run(config)
            tried.add(of_network)
    if launcher_env.detect().local_rank == 0:
        for data in {repr(config.data): config.data for config in configs}.values():
            fetch(data)


def run_all(configs: Sequence[Config]) -> None:
    """Run every point of a sweep; one whose training fails does not keep the others from theirs.

    Raises ``ConfigError`` before the first begins, and ``RunError`` at the end, naming the points
    that failed on all ranks alike (a loss that is not finite), and at once for any other failure.
    """
    check_all(configs)
    failed: list[str] = []
    with signals.watched() as stop:
        for number, config in enumerate(configs, 1):
            try:
                _run(config, None, stop)
            except RunError as error:
                if isinstance(error, Stopped) or not error.on_all_ranks:
                    raise
                if process_group.is_started():
                    process_group.stop()  # so that the next run starts anew
                failed.append(f"{run_dir.name(config)}: {error}")
            if stop.agreed and number < len(configs):
                name = signals.name(stop.agreed)
                raise Stopped(
                    f"stopped by {name} after {number} of {len(configs)} points", stop.agreed
                )
    if failed:
        points = f"{len(failed)} of {len(configs)} points failed: " + "; ".join(failed)
        raise RunError(points, on_all_ranks=True)


def run(config: Config, log: RoundCallback | None = None) -> Summary:
    """Train as ``config`` says; every rank returns the same summary, rank 0 writes ``run_dir``.

    Rank 0 shows progress and result; with ``log`` it tells that of every round instead, and is
    silent.  The ranks are those of an initialised process group, else those that the launcher
    started.  A finished run in ``run_dir`` is not repeated: its summary is returned.  An unfinished
    one goes on from its newest checkpoint.  A signal (``signals.ASKING``) ends it after its round.

    Raises ``ConfigError`` (on every rank, before data load) for mistakes in the options,
    ``RunError``, naming rank and round, when training fails, and ``Stopped`` after a signal.
    """
    with signals.watched() as stop:
        return _run(config, log, stop)


def _run(config: Config, log: RoundCallback | None, stop: StopRequest) -> Summary:
    started = time.perf_counter()
    config = typed(config)
    check(config)
    info = _rank_info()
    place = device.choose(config, info)
    torch.set_num_threads(place.threads)
    if place.device.type == "cpu":
        malloc.keep_freed_memory()
    dry_run.dry_run(config)
    folder = run_dir.name(config)
    with (
        _process_group(config, info, place, folder),
        ExitStack() as held,
        _random_state(place),
        tensor_float(config.tf32),
    ):
        summary, taken = _claim(folder, config, held)
        if summary is None:
            with _noting_failures(folder):
                summary = _train(config, info, place, folder, started, taken, log, stop)
        elif info.rank == 0 and log is None:
            print(f"this run is finished; its files stay as they are in {folder}")
        if info.rank == 0 and log is None:
            show_result(summary)
    return summary


def _rank_info() -> RankInfo:
    if not process_group.is_started():
        return launcher_env.detect()
    return launcher_env.of_caller(process_group.rank(), process_group.world_size())


@contextmanager
def _process_group(
    config: Config, info: RankInfo, place: DevicePlacement, folder: Path
) -> Iterator[None]:
    """Join the other ranks, unless there are none or the caller has done so; part at the end.

    Meanwhile a watchdog looks after them.  After a failure nobody waits for ranks that may never
    come.
    """
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    if info.launcher == "none" or process_group.is_started():
        yield
        return
    seconds = config.comm.timeout_seconds
    channel = process_group.start(info.rank, info.world_size, place.backend, seconds)
    watchdog = Watchdog(channel, seconds, partial(run_dir.note_failure, folder))
    watchdog.begin()
    try:
        yield
        process_group.stop()
    finally:
        watchdog.end()


@contextmanager
def _noting_failures(folder: Path) -> Iterator[None]:
    """Say in the folder why a run ended."""
    try:
        yield
    except Exception as error:
        run_dir.note_failure(folder, f"{error}" or type(error).__name__)
        raise


def _random_state(place: DevicePlacement) -> AbstractContextManager[None]:
    """Training seeds torch's generators; the caller's are put back."""
    return torch.random.fork_rng([place.device] if place.device.type == "cuda" else [])


def _fetch(config: Config, info: RankInfo) -> None:
    """The first rank of each node sees to the files of the data set, and the others wait.

    What is wrong on any node is a mistake on all ranks.
    """
    mistakes: tuple[str, ...] = ()
    if info.local_rank == 0:
        try:
            fetch(config.data)
        except ConfigError as error:
            mistakes = error.mistakes
    found = [each for each in collectives.all_gather_object(mistakes) if each]
    if found:
        raise AgreedError(*found[0])


def _claim(
    folder: Path, config: Config, held: ExitStack
) -> tuple[Summary | None, Resumption | None]:
    """Rank 0 claims the folder; what it finds, or what is wrong with it, reaches all ranks.

    The summary of a finished run, or what an interrupted one goes on from: that on rank 0 alone.
    """
    summary, taken = None, None
    mistakes: tuple[str, ...] = ()
    if process_group.rank() == 0:
        try:
            summary = held.enter_context(run_dir.claimed(folder, config))
            taken = None if summary else resume.load_checkpoint(folder, config)
        except ConfigError as error:
            mistakes = error.mistakes
    summary, mistakes = collectives.broadcast_object((summary, mistakes))
    if mistakes:
        raise AgreedError(*mistakes)
    return summary, taken


def _train(
    config: Config,
    info: RankInfo,
    place: DevicePlacement,
    folder: Path,
    started: float,
    taken: Resumption | None,
    log: RoundCallback | None,
    stop: StopRequest,
) -> Summary:
    """Rounds and result; rank 0 alone writes and shows."""
    if info.rank == 0 and log is None:
        print(_what_was_found(info, place, folder, taken), flush=True)
    _fetch(config, info)
    trainer = prepare(config, place)
    trainer.stop = stop
    history, facts, earlier = _take_up(config, trainer, taken)
    startup = time.perf_counter() - started
    keeper = CheckpointWriter(folder, config.checkpoint, facts, began=started - earlier)
    records = _rounds(trainer, _logs(config, info, folder, len(history), log), keeper, history)
    seconds = startup, time.perf_counter() - started + earlier
    resumed = facts["resumed_after"]
    of_run = config, info, place, records, trainer, seconds, folder, resumed, len(history)
    summary = summarise(*of_run)
    save_models(trainer, folder)
    if info.rank == 0:
        run_dir.finish(folder, summary)
    return summary


def _what_was_found(
    info: RankInfo, place: DevicePlacement, folder: Path, taken: Resumption | None
) -> str:
    line = (
        f"launcher {info.launcher}, nodes {info.nodes}, ranks {info.world_size}, "
        f"backend {backend(place)}, device {place.device}, "
        f"threads per rank {place.threads}, run_dir {folder}"
    )
    return line if taken is None else f"{line}\ngoing on after round {len(taken.history)}"


def _take_up(
    config: Config, trainer: Trainer, taken: Resumption | None
) -> tuple[list[RoundRecord], dict[str, Any], float]:
    """Bring the trainer to where an interrupted run was.

    The records of its rounds, what its checkpoints say of it, and the seconds that it took.
    """
    found: tuple[Any, ...] = ([], [], 0.0)
    if taken is not None:
        found = (taken.history, taken.resumed_after(), taken.content["seconds"])
    history, resumed_after, earlier = collectives.broadcast_object(found)
    if history:
        resume.restore(taken, trainer.cohort)
    facts = {"config": to_dict(config), "resumed_after": resumed_after}
    return history, facts, earlier


def _logs(
    config: Config, info: RankInfo, folder: Path, behind: int, log: RoundCallback | None
) -> list[RoundCallback]:
    """Who is told of rounds, on rank 0, when so many are ``behind``."""
    if info.rank != 0:
        return []
    return [RunLog(folder, behind), log or Display(config.rounds, behind)]


def _rounds(
    trainer: Trainer,
    logs: list[RoundCallback],
    keeper: CheckpointWriter,
    history: list[RoundRecord],
) -> list[RoundRecord]:
    """All that are left, until a signal asks for the end."""
    with ExitStack() as closing:
        closing.callback(keeper.close)
        for each in logs:
            closing.callback(each.close)
        return trainer.train(logs, keeper, history)
