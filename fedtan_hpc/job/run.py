"""A whole job: from the options to a trained model and its summary."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..config.errors import ConfigError, RunError, Stopped, check_together, printable
from ..config.hydra_errors import typed
from ..config.schema import Config
from ..config.validate import check
from ..data import memory_need
from ..data.download import fetch
from ..data.federated_data import load_own
from ..distributed import collectives, counters, process_group
from ..evaluation import trackers
from ..evaluation.best_model import BestModelFile
from ..evaluation.callbacks import RoundCallback, RunInfo
from ..evaluation.loggers import Display, ProbeFile, RoundsFile, show_result
from ..evaluation.records import Summary
from ..probing import schedule
from ..runtime import device, import_path, launcher_env, malloc, signals
from ..runtime.device import tensor_float
from ..runtime.global_random import preserved
from ..runtime.signals import StopRequest
from . import callbacks as run_callbacks
from . import dry_run, resume, run_dir
from .callbacks import as_run_error, tell, tell_failure
from .checkpoint_writer import CheckpointWriter
from .context import RunContext
from .resume import Resumption
from .setup import OpenedData, check_memory, open_data, prepare
from .summary import save_models, summarise

Result = TypeVar("Result")


def check_all(configs: Sequence[Config]) -> None:
    """Finds the mistakes of all runs of a sweep before the first one begins.

    Checks networks; rank 0 also checks callbacks, and the first rank of each node the data's files.
    Raises ``ConfigError``.
    """
    checked: set[str] = set()
    info = launcher_env.detect()
    for config in configs:
        if config.data.is_own:
            continue
        network = repr((config.model, config.data, config.algorithm))
        if network not in checked:
            dry_run.dry_run(config, info.world_size)
            checked.add(network)
    if info.rank == 0:  # which makes the callbacks
        for target in dict.fromkeys(each for config in configs for each in config.callbacks):
            import_path.resolve("callbacks", target, "a callback")
        for own in (config for config in configs if config.data.is_own):
            load_own(own.data, own.seed)
    if info.local_rank == 0:
        for data in {repr(config.data): config.data for config in configs}.values():
            fetch(data)


def _check_memory(config: Config) -> None:
    info = launcher_env.detect()
    check_memory(config, device.choose(config, info), info.world_size)


def keep_freed_memory(config: Config) -> None:
    """Lets a process that only runs jobs keep the memory that steps on a CPU free."""
    if device.choose(config, launcher_env.detect()).device.type == "cpu":
        malloc.keep_freed_memory()


def run_all(configs: Sequence[Config]) -> None:
    """Runs all points of a sweep, also after one whose training fails on all ranks alike.

    Raises ``ConfigError`` before the first begins; ``RunError`` at the end, naming the points that
    failed on all ranks (a loss that is not finite), and at once for any other failure.
    """
    check_all(configs)
    failed: list[str] = []
    with signals.handle_stop_signals() as stop:
        for number, config in enumerate(configs, 1):
            try:
                _run(config, None, stop, planned=configs if number == 1 else ())
            except RunError as error:
                if isinstance(error, Stopped) or not error.on_all_ranks:
                    raise
                if process_group.is_started():
                    process_group.stop()  # the next run starts it again
                failed.append(f"{run_dir.name(config)}: {error}")
            if stop.agreed_signal and number < len(configs):
                name = signals.name(stop.agreed_signal)
                message = f"stopped by {name} after {number} of {len(configs)} points"
                raise Stopped(message, stop.agreed_signal)
    if failed:
        points = f"{len(failed)} of {len(configs)} points failed: " + "; ".join(failed)
        raise RunError(points, on_all_ranks=True)


def run(
    config: Config | Mapping[str, Any], callbacks: Sequence[RoundCallback] | None = None
) -> Summary:
    """Trains as ``config`` says; rank 0 writes ``run_dir``, and every rank returns the summary.

    The ranks are those of an initialised process group, else those that the launcher started.
    A finished run in ``run_dir`` is not repeated: its summary is returned.  An unfinished run
    continues from its newest checkpoint.  A signal (``signals.STOP_SIGNALS``) ends the run after
    its round, with a checkpoint.

    Args:
        config: The options, or some of them by name: a dict, or hydra's DictConfig.
        callbacks: Objects that rank 0 tells of the run, beside those of the option ``callbacks``.
            With a list, an empty one too, rank 0 prints nothing; without it, rank 0 prints
            progress and result.

    Raises:
        ConfigError: On every rank, before any data loads, for mistakes in the options.
        RunError: Training or a callback fails; the message names rank and round.
        Stopped: On every rank, after a signal.
    """
    with signals.handle_stop_signals() as stop:
        return _run(config, callbacks, stop)


@contextmanager
def _failing_exits() -> Iterator[None]:
    """Raises ``RunError`` for an exit of the user's code, which would end one rank unnoticed."""
    try:
        yield
    except SystemExit as error:
        where = f"rank {process_group.rank()}, round {counters.progress.round}"
        raise RunError(f"{where}: SystemExit: {error}", on_all_ranks=False) from error


@_failing_exits()
def _run(
    options: Config | Mapping[str, Any],
    callbacks: Sequence[RoundCallback] | None,
    stop: StopRequest,
    planned: Sequence[Config] | None = None,
) -> Summary:
    """Does what ``run`` does; checks the memory of the ``planned`` runs first, by default its own.

    Ranks have unequal memory, so they agree.  A later run of a sweep is not checked again, when
    this process keeps memory that the run would use.
    """
    started = time.perf_counter()
    config = typed(options)
    check(config)
    run = RunContext.of(config, started)
    torch.set_num_threads(run.placement.threads)
    tried_by_ranks = config.data.is_own or config.model.weights is not None
    notes = [] if tried_by_ranks else dry_run.dry_run(config, run.rank_info.world_size)
    shows = run.is_first and callbacks is None
    notes += [] if config.data.is_own else memory_need.long_work(config)
    gpus = [run.placement.device] if run.placement.device.type == "cuda" else []
    with run.process_group(), ExitStack() as claim, preserved(gpus), tensor_float(config.tf32):
        checked = [config] if planned is None else planned
        _agreed(True, lambda: check_together(partial(_check_memory, each) for each in checked))
        run, opened, more = _opened(run)
        notes += more
        enter = partial(claim.enter_context, run_dir.claimed(run.run_dir, run.config))
        summary: Summary | None = collectives.broadcast_object(_agreed(run.is_first, enter))
        if summary is not None:
            if shows:
                where = printable(run.run_dir)
                print(f"this run is finished; its files stay as they are in {where}")
                show_result(summary)
            return summary
        observers, resumption = _agreed(run.is_first, partial(_begin, run, opened)) or (
            [],
            Resumption(),
        )
        if shows:
            lines = [*_opening_lines(run, resumption), *notes]
            print("\n".join(map(printable, lines)), flush=True)
        observers = [*([Display()] if callbacks is None else callbacks), *observers]
        with _noting_failures(run.run_dir), stop.ctrl_c.blamed():
            return _train(run, opened, observers, resumption, stop)


def _opened(run: RunContext) -> tuple[RunContext, OpenedData, list[str]]:
    """Opens the data on all ranks, which try the network if data or weights are the user's.

    Returns the run with the options that the data decide, and lines that say what was found.
    """
    config, opened = open_data(run.config, run.placement)
    if config.algorithm.probe_run is not None:
        probes = _agreed(run.is_first, lambda: schedule.read_saved(config, run.run_dir))
        opened = replace(opened, saved_probes=collectives.broadcast_object(probes))
    notes = [opened.note] if opened.note else []
    if opened.dataset is not None or config.model.weights is not None:
        ranks = run.rank_info.world_size
        notes += _agreed(True, partial(dry_run.dry_run, config, ranks, opened.dataset)) or []
    return replace(run, config=config), opened, notes


def _begin(run: RunContext, opened: OpenedData) -> tuple[list[RoundCallback], Resumption]:
    """Makes the callbacks of the option, and prepares the folder; rank 0 calls it."""
    observers = [run_callbacks.make(target) for target in run.config.callbacks]
    return observers, resume.load_checkpoint(run.run_dir, run.config, opened.dataset)


def _train(
    run: RunContext,
    opened: OpenedData,
    observers: list[RoundCallback],
    resumption: Resumption,
    stop: StopRequest,
) -> Summary:
    _agreed(run.rank_info.local_rank == 0, lambda: fetch(run.config.data))
    with as_run_error():
        trainer = prepare(run.config, run.placement, opened)
    trainer.stop = stop
    resumption = resume.restore(resumption, trainer.cohort)
    trainer.schedule.go_on(resumption.probes, len(resumption.history), resumption.layers)
    if run.is_first:
        trainer.schedule.save_choice(run.run_dir)
    startup_seconds = time.perf_counter() - run.started
    counters.progress.round = rounds_done = len(resumption.history)
    began = run.started - resumption.seconds
    writer = CheckpointWriter(trainer.cohort, stop, began, resumption.resumed_after)
    callbacks: list[RoundCallback] = [writer]
    if run.is_first:
        has_global_model = not trainer.cohort.states.are_models
        best = [BestModelFile(trainer.model, resumption.history)] if has_global_model else []
        tracking = trackers.make(run.config.tracking)
        callbacks = [RoundsFile(), ProbeFile(), *tracking, *best, writer, *observers]
    try:
        tell(callbacks, "run_began", RunInfo(run.config, run.run_dir, rounds_done), stop)
        records = trainer.train(callbacks, resumption.history)
        with as_run_error():
            writer.save_last(len(records))
            summary = summarise(run, trainer, records, resumption, startup_seconds)
            save_models(trainer, run.run_dir)
            if run.is_first:
                run_dir.finish(run.run_dir, summary)
        tell(callbacks, "run_ended", summary, stop)
    except BaseException as error:
        tell_failure(callbacks, error, stop)
        raise
    finally:
        trainer.store.close()
    with as_run_error():
        process_group.barrier()  # the other ranks learn here if a callback has failed
    return summary


def _agreed(calls: bool, function: Callable[[], Result]) -> Result | None:
    """Calls ``function`` on the ranks that ``calls``, and returns its result there.

    A ``ConfigError`` of any rank is raised on every rank.
    """
    result: Result | None = None
    found: tuple[type[ConfigError], tuple[str, ...]] | None = None
    if calls:
        try:
            result = function()
        except ConfigError as error:
            found = type(error), error.mistakes
    for kind, mistakes in filter(None, collectives.all_gather_object(found)):
        agreed = kind(*mistakes)
        agreed.on_all_ranks = True
        raise agreed
    return result


@contextmanager
def _noting_failures(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        run_dir.note_failure(folder, printable(error) or type(error).__name__)
        raise


def _opening_lines(run: RunContext, resumption: Resumption) -> list[str]:
    info, placement = run.rank_info, run.placement
    line = (
        f"launcher {info.launcher}, nodes {info.nodes}, ranks {info.world_size}, "
        f"backend {run.backend}, device {placement.device}, "
        f"threads per rank {placement.threads}, run_dir {run.run_dir}"
    )
    rounds_done = len(resumption.history)
    return [line, *([f"going on after round {rounds_done}"] if rounds_done else [])]
