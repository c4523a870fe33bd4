"""The whole job: options in, a trained model and its summary out."""

from __future__ import annotations

import platform
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import __version__, comm, device, environment, files, models, run_folder, trial
from .checks import check
from .config import Config
from .device import Place
from .display import Display, show_result
from .environment import RankInfo
from .errors import ConfigError, RunError
from .explain import typed
from .fetch import fetch
from .metrics import NullLog, RoundRecord, RunLog, Summary
from .prepare import prepare
from .trainer import Trainer


def check_all(configs: Sequence[Config]) -> None:
    """Find the mistakes of all runs of a sweep before the first begins: networks and files.

    The first rank of each node looks for files; raises ``ConfigError``.
    """
    tried: set[str] = set()
    for config in configs:
        of_network = repr((config.model, config.data, config.algorithm))
        if of_network not in tried:
            trial.try_out(config)
            tried.add(of_network)
    if environment.detect().local_rank == 0:
        for data in {repr(config.data): config.data for config in configs}.values():
            fetch(data)


def run_all(configs: Sequence[Config]) -> None:
    """Run every point of a sweep; one whose training fails does not keep the others from theirs.

    Raises ``ConfigError`` before the first begins, and ``RunError`` at the end, naming the points
    that failed on all ranks alike (a loss that is not finite), and at once for any other failure.
    """
    check_all(configs)
    failed = []
    for config in configs:
        try:
            run(config)
        except RunError as error:
            if not error.on_all_ranks:
                raise
            if comm.is_started():
                comm.stop()  # so that the next run starts anew
            failed.append(f"{run_folder.name(config)}: {error}")
    if failed:
        points = f"{len(failed)} of {len(configs)} points failed: " + "; ".join(failed)
        raise RunError(points, on_all_ranks=True)


def run(config: Config, log: NullLog | None = None) -> Summary:
    """Train as ``config`` says; every rank returns the same summary, rank 0 writes ``run_dir``.

    Rank 0 shows progress and result; with ``log`` it tells that of every round instead, and is
    silent.  The ranks are those of an initialised process group, else those that the launcher
    started.  A finished run in ``run_dir`` is not repeated: its summary is returned.

    Raises ``ConfigError`` (on every rank, before data load) for mistakes in the options, and
    ``RunError``, naming rank and round, when training fails.
    """
    started = time.perf_counter()
    config = typed(config)
    check(config)
    info = _rank_info()
    place = device.choose(config, info)
    torch.set_num_threads(config.threads)
    trial.try_out(config)
    with _process_group(config, info, place), ExitStack() as held, _random_state(place):
        folder = run_folder.name(config)
        summary = _claim(folder, config, held)
        if summary is None:
            summary = _train(config, info, place, folder, started, log)
        elif info.rank == 0 and log is None:
            print(f"this run is finished; its files stay as they are in {folder}")
        if info.rank == 0 and log is None:
            show_result(summary)
    return summary


def _rank_info() -> RankInfo:
    if not comm.is_started():
        return environment.detect()
    return environment.of_caller(comm.rank(), comm.world_size())


@contextmanager
def _process_group(config: Config, info: RankInfo, place: Place) -> Iterator[None]:
    """Join the other ranks, unless there are none or the caller has done so; part at the end.

    After a failure nobody waits for ranks that may never come.
    """
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    if info.launcher == "none" or comm.is_started():
        yield
        return
    comm.start(info.rank, info.world_size, place.backend, config.comm.timeout_seconds)
    yield
    comm.stop()


def _random_state(place: Place) -> AbstractContextManager[None]:
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
    found = [each for each in comm.all_gather_object(mistakes) if each]
    if found:
        raise ConfigError(*found[0])


def _claim(folder: Path, config: Config, held: ExitStack) -> Summary | None:
    """Rank 0 claims the folder; what it finds, or what is wrong with it, reaches all ranks."""
    outcome: Any = None
    if comm.rank() == 0:
        try:
            outcome = held.enter_context(run_folder.claimed(folder, config))
        except ConfigError as error:
            outcome = error.mistakes
    outcome = comm.broadcast_object(outcome)
    if isinstance(outcome, tuple):
        raise ConfigError(*outcome)
    return outcome  # type: ignore[no-any-return]


def _train(
    config: Config,
    info: RankInfo,
    place: Place,
    folder: Path,
    started: float,
    log: NullLog | None,
) -> Summary:
    """Rounds and result; rank 0 alone writes and shows."""
    if info.rank == 0 and log is None:
        print(
            f"launcher {info.launcher}, ranks {info.world_size}, backend {_backend(place)}, "
            f"device {place.device}, threads per rank {config.threads}, run_dir {folder}"
        )
    _fetch(config, info)
    trainer = prepare(config, place, info.local_world_size)
    startup = time.perf_counter() - started
    logs: list[NullLog] = []
    if info.rank == 0:
        logs = [RunLog(folder), log or Display(config.rounds)]
    try:
        records = trainer.train(logs)
    finally:
        for each in logs:
            each.close()
    parameters = models.parameter_count(trainer.model)
    seconds = startup, time.perf_counter() - started
    summary = _summarise(config, info, place, records, folder, parameters, seconds)
    compiling = trainer.cohort.training.loss.compile_seconds
    summary = replace(summary, compile_seconds=compiling)
    _save(trainer, folder)
    if info.rank == 0:
        run_folder.finish(folder, summary)
    return summary


def _save(trainer: Trainer, folder: Path) -> None:
    """Rank 0 writes the global model, and what the clients drawn so far have for themselves."""
    if comm.rank() == 0:
        state = {key: value.cpu() for key, value in trainer.model.state_dict().items()}
        files.replace(folder / "model.pt", lambda path: torch.save(state, path))
    states = trainer.cohort.states
    kept = {}
    for client in states.drawn() if states.exist else []:
        named = states.named(client, trainer.model)
        if comm.rank() == 0:
            kept[client] = named
    if kept:
        files.replace(folder / "clients.pt", lambda path: torch.save(kept, path))


def _peak_memory(device: torch.device) -> torch.Tensor:
    """Most memory that this process has had, in bytes: of the GPU if it computes there; 0-d."""
    if device.type == "cuda":
        return torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    return torch.tensor(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _backend(place: Place) -> str:
    """The carrier of the collectives, if there are any."""
    return place.backend if comm.is_started() else "none"


def _summarise(
    config: Config,
    info: RankInfo,
    place: Place,
    records: list[RoundRecord],
    folder: Path,
    parameters: int,
    seconds: tuple[float, float],
) -> Summary:
    last = records[-1]
    assert last.test_accuracy is not None
    assert last.test_loss is not None
    own = last.clients_test_accuracy_mean
    return Summary(
        algorithm=str(config.algorithm.name),
        rounds=config.rounds,
        test_accuracy=last.test_accuracy,
        judged="global model" if own is None else "mean over the clients' own models",
        test_loss=last.test_loss,
        pooled_train_loss=last.pooled_train_loss,
        clients_judged=last.clients_judged,
        clients_test_accuracy_mean=own,
        clients_test_accuracy_spread=last.clients_test_accuracy_spread,
        clients_own_mix_accuracy_mean=last.clients_own_mix_accuracy_mean,
        clients_own_mix_accuracy_spread=last.clients_own_mix_accuracy_spread,
        total_seconds=seconds[1],
        startup_seconds=seconds[0],
        peak_memory_bytes=max(int(peak) for peak in comm.all_gather(_peak_memory(place.device))),
        median_round_seconds=statistics.median(record.round_seconds for record in records),
        world_size=info.world_size,
        backend=_backend(place),
        device=str(place.device),
        parameters=parameters,
        versions={
            "fedtan_hpc": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        run_dir=str(folder),
    )
