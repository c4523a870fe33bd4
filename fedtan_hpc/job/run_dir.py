"""The folder of a run: its name, its files, its lock; a finished run is never overwritten.

config.yaml    the options, resolved
rounds.jsonl   one line for each round (``records.RoundRecord``)
probe.jsonl    one line for each probed round (``probe_records.ProbeRecord``), if any is
layers.json    the BN layers that algorithm.probe_run has chosen
probe/         what tools/probe.py has found on the final model
summary.json   the result (``records.Summary``); only a finished run has it
model.pt       state_dict of the final global model
best.pt        state_dict of the global model at the best evaluation, if there is one such model
clients.pt     private tensors of each client, if the algorithm has them
events.*       TensorBoard
rounds.csv     the rounds as a table, and wandb/: only if tracking.to has csv or wandb
trackers.json  names of the run at Weights & Biases and MLflow, by which it continues there
checkpoints/   state to continue from after an interruption (``checkpoint_format``)
summary-roundN.json  the result after round N of a run that went on with more rounds
failure.json   why the run ended early; removed when it continues
.lock          locked while a run writes here
interrupted-N/ files of an unfinished run that was here before this one began anew
"""

import fcntl
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from ..config import path_options
from ..config.enums import DataName, ModelSource, PartitionName, RunDirMode
from ..config.errors import ConfigError, FolderInUseError, format_option_error
from ..config.schema import Config, DataConfig, to_dict
from ..config.validation.resume import may_change
from ..evaluation import probe_records, saved_records
from ..evaluation.records import Summary
from ..files import atomic_files, folders, owners, reading
from ..files.reading import FileError
from .saved.options import completed
from .saved.options import read as read_options

NOT_IDENTIFYING = (
    *("run_dir", "run_dir_mode", "checkpoint", "callbacks", "tracking", "probe"),
    *("resume", "resume_change", "resume_trust"),
)
"""Options and groups that do not change what a run computes."""
_WHERE_COMPUTED = ("comm", "threads", "device", "ranks_per_client")
"""Options that name the folder, but may change when a run continues."""
_MODES = {RunDirMode.private: folders.PRIVATE, RunDirMode.group: folders.GROUP}
_MODELS = ("model.pt", "best.pt", "clients.pt")
_RECORDS = (
    *("config.yaml", saved_records.ROUNDS, probe_records.NAME),
    *("layers.json", "rounds.csv", "trackers.json"),
)
_OTHERS = (saved_records.SUMMARY, "failure.json", "submitted.json", "best.abandoned")
_HOW_READ = ("data.loading", "data.workers")
"""Options of the data that do not change what a run computes."""


def name(config: Config) -> Path:
    """Returns the option ``run_dir``, or runs/ and a name made from the other options."""
    if config.run_dir is not None:
        return path_options.expanded(config.run_dir)
    options = {key: v for key, v in to_dict(config).items() if key not in NOT_IDENTIFYING}
    options["data"] = {k: v for k, v in options["data"].items() if f"data.{k}" not in _HOW_READ}
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    is_target = config.model.source is ModelSource.import_
    network = str(config.model.target).rpartition(":")[2] if is_target else config.model.name
    is_natural = config.partition.name is PartitionName.natural  # its clients are not known yet
    clients = "" if is_natural else f"{config.clients}clients-"
    steps = f"{config.local_steps}steps"
    if config.local_epochs is not None:
        steps = f"{config.local_epochs}epochs"
    counts = f"{clients}{steps}-seed{config.seed}"
    names = (config.algorithm.name, _data_name(config.data), network, config.partition.name)
    return Path("runs") / "-".join([*names, counts, digest])


def _data_name(config: DataConfig) -> str:
    """Returns the name of the data set; that of the function or the folder of the user's data."""
    name = str(config.name)
    if config.name is DataName.import_:
        name = str(config.target).rpartition(":")[2]
    elif config.name is DataName.folder:
        name = path_options.expanded(config.root or "").name
    return re.sub(r"[^\w.]+", "_", name)


def make(folder: Path, config: Config) -> None:
    """Makes the folder of a run, closed to other users as ``run_dir_mode`` says."""
    folders.make(folder, _MODES[config.run_dir_mode])


@contextmanager
def claimed(folder: Path, config: Config) -> Iterator[Summary | None]:
    """Locks the folder for a run, or gives the summary if the run is finished there.

    A finished run that ``resume_change`` lets go on counts as unfinished.  Raises ``ConfigError``
    if another process has locked the folder, if it has a finished run of another configuration, or
    if it cannot be written.
    """
    if (finished := _finished(folder, config)) is not None:
        yield finished
        return
    with config_error_if_unwritable(folder):
        make(folder, config)
        lock = os.fdopen(folders.open_lock(folder / ".lock"), "a")
    with lock:
        _lock(lock, folder)
        # Another process may have finished the run before it released the lock.
        yield _finished(folder, config)


def check_free(folder: Path) -> None:
    """Raises ``FileError`` if a name that the run will write is taken by anything but a file."""
    folders.check_free(folder, (*_MODELS, *_RECORDS, *_OTHERS), ("checkpoints", "wandb"))


def check_trusted(folder: Path, config: Config) -> None:
    """Raises ``FileError`` if another user may have written what a run goes on from.

    Unless ``resume_trust`` allows it.  ``folder`` is that of the earlier run.
    """
    if not config.resume_trust:
        names = ("", "checkpoints", "config.yaml", saved_records.ROUNDS, "best.pt")
        paths = [folder / name for name in names]
        paths += sorted((folder / "checkpoints").glob("round-*"))
        owners.check(paths, "if you trust all who may write it, add resume_trust=true")


def begin(folder: Path, config: Config, anew: bool = True) -> None:
    """Writes the options of a run that begins or continues in a folder that is locked.

    ``anew`` moves the files of an earlier, unfinished run aside.  A run that was finished is so no
    more: its summary gets another name first.
    """
    with config_error_if_unwritable(folder):
        if anew:
            _set_aside(folder)
        _rename_summary(folder)
        (folder / "failure.json").unlink(missing_ok=True)
        text = OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
        atomic_files.replace_text(folder / "config.yaml", text)


def note_failure(folder: Path, message: str) -> None:
    """Writes ``failure.json``, unless it exists: the first message stays."""
    note = {"message": message, "time": datetime.now().astimezone().isoformat(timespec="seconds")}
    with suppress(OSError):
        atomic_files.create_text(folder / "failure.json", json.dumps(note) + "\n")


def failure(folder: Path) -> str:
    """Returns the message in ``failure.json``; empty if there is none."""
    try:
        message = reading.read_json_object(folder / "failure.json").get("message")
    except (FileError, OSError):
        return ""
    return message if isinstance(message, str) else ""


def _lock(lock: IO[str], folder: Path) -> None:
    """Tries for two seconds, because a look at the folder locks it too (``reporting.run_list``)."""
    deadline = time.monotonic() + 2
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                allowed = "a folder that no other run is writing"
                remedy = "wait for that run to end, or choose another run_dir"
                message = format_option_error("run_dir", folder, allowed, remedy)
                raise FolderInUseError(message) from None
            time.sleep(0.05)
        except OSError as error:
            why = f"its file system has no locks ({error.strerror}), so see to it that no other run"
            print(f"fedtan_hpc: run_dir={folder}: {why} writes there", file=sys.stderr, flush=True)
            return


@contextmanager
def config_error_if_unwritable(folder: Path) -> Iterator[None]:
    """Raises ``ConfigError`` for an ``OSError`` inside."""
    try:
        yield
    except OSError as error:
        allowed, remedy = "a folder that can be written", f"choose another ({error.strerror})"
        raise ConfigError(format_option_error("run_dir", folder, allowed, remedy)) from error


def finish(folder: Path, summary: Summary) -> None:
    """Writes ``summary.json``, the last file of a run."""
    atomic_files.replace_text(folder / "summary.json", json.dumps(asdict(summary), indent=2) + "\n")


def _finished(folder: Path, config: Config) -> Summary | None:
    """Returns the summary in the folder; raises ``ConfigError`` if it is not of ``config``."""
    if not os.path.lexists(folder / saved_records.SUMMARY):  # also False without permission to look
        return None
    try:
        summary = saved_records.summary(folder)
        saved = read_options(folder / "config.yaml")
    except (FileError, OSError) as error:
        allowed = "a new folder, or one with a whole run"
        why = " ".join(f"its finished run cannot be read ({error}): choose another run_dir".split())
        raise ConfigError(format_option_error("run_dir", folder, allowed, why)) from error
    if not (differing := differences(saved, config)):
        return summary
    named = path_options.expanded(config.resume).resolve()
    goes_on = config.resume == "auto" or folder.resolve() in (named, *named.parents)
    refused = [each for each in differing if not may_change(each, config.resume_change)]
    if refused or not goes_on:
        allowed = "a new folder, or that of the same configuration"
        remedy = f"it holds a finished run with another {', '.join(differing)}: choose another"
        more = f", or {how_to_change(refused, config)} to go on from its end" if goes_on else ""
        raise ConfigError(
            format_option_error("run_dir", folder, allowed, f"{remedy} run_dir{more}")
        )
    return None


def how_to_change(refused: list[str], config: Config) -> str:
    """Returns the word that lets a run go on with other values of the ``refused`` options."""
    return f"add resume_change=[{','.join([*config.resume_change, *refused])}]"


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """Returns the options by which ``config`` asks for another result than the ``saved`` ones."""
    ignored = (*NOT_IDENTIFYING, *_WHERE_COMPUTED)
    differing = _differences(completed(saved), to_dict(config))
    differing = {option for option in differing if option.partition(".")[0] not in ignored}
    return sorted(differing.difference(_HOW_READ))


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> set[str]:
    differing = set()
    for key in a.keys() | b.keys():
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            differing |= _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            differing.add(prefix + key)
    return differing


def _rename_summary(folder: Path) -> None:
    path = folder / "summary.json"
    if path.exists():
        rounds = saved_records.summary(folder).rounds
        path.rename(folder / f"summary-round{rounds}.json")


def _set_aside(folder: Path) -> None:
    # Checkpoints first: they are useless in a folder without rounds.jsonl.
    names = ["checkpoints", "wandb", "best.abandoned", *_RECORDS, *_MODELS]
    paths = [folder / name for name in names] + list(folder.glob("events.*"))
    paths = [path for path in paths if path.exists()]
    if not paths or paths == [folder / "config.yaml"]:  # no run had begun
        return
    numbers = itertools.count(1)
    targets = (folder / f"interrupted-{number}" for number in numbers)
    target = next(path for path in targets if not path.exists())
    folders.make_below(target)
    for path in paths:
        path.rename(target / path.name)
