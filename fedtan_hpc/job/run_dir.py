"""The folder of a run: its name, what it holds, and that a finished run is never overwritten.

config.yaml    the options, resolved
rounds.jsonl   a line a round (``metrics.RoundRecord``)
summary.json   the result (``metrics.Summary``); its presence means that the run is finished
model.pt       state_dict of the final global model
clients.pt     what each client keeps for itself, if the algorithm has such parts
events.*       TensorBoard
checkpoints/   from which an interrupted run goes on (``checkpoint``)
failure.json   why the run ended before its time; gone when it goes on
.lock          held while a run writes here
interrupted-N/ what an unfinished run left in this folder before the present one began anew
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import yaml
from omegaconf import OmegaConf

from ..config.enums import ModelSource
from ..config.errors import ConfigError, format_option_error
from ..config.schema import Config, to_dict
from ..evaluation.records import Summary
from ..runtime import atomic_files

_NO_MATTER = ("run_dir", "checkpoint", "resume")
_WHERE = ("comm", "threads", "device")
"""Options that say where a run is computed: they name its folder, but it may go on elsewhere."""


def name(config: Config) -> Path:
    """The folder that ``run_dir`` says, else one named after the other options."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    options = json.dumps(_identity(config), sort_keys=True)
    digest = hashlib.sha256(options.encode()).hexdigest()[:8]
    words = (
        config.algorithm.name,
        config.data.name,
        _network(config),
        config.partition.name,
        f"{config.clients}clients",
        f"{config.local_steps}steps",
        f"seed{config.seed}",
        digest,
    )
    return Path("runs") / "-".join(words)


def _network(config: Config) -> str:
    """The name of the network, of one's own too."""
    if config.model.source is not ModelSource.target:
        return config.model.name
    return str(config.model.target).rpartition(":")[2]


@contextmanager
def claimed(folder: Path, config: Config) -> Iterator[Summary | None]:
    """Hold the folder for a run, or give the summary of the same run, finished.

    While it is held no other run can have it.  Raises ``ConfigError`` if it is held, if it has a
    finished run of another configuration, or if it cannot be written.
    """
    if (finished := _finished(folder, config)) is not None:
        yield finished
        return
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115
    with lock:
        _hold(lock, folder)
        # A run that held the folder until now may have finished in it.
        yield _finished(folder, config)


def begin(folder: Path, config: Config, anew: bool = True) -> None:
    """Write the options of the run that begins, or goes on, in a folder that is held.

    What an earlier one left is set aside if this one begins ``anew``.
    """
    with written(folder):
        if anew:
            _set_aside(folder)
        (folder / "failure.json").unlink(missing_ok=True)
        text = OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
        atomic_files.replace_text(folder / "config.yaml", text)


def note_failure(folder: Path, message: str) -> None:
    """Say why the run ended, for whoever looks for it later; the first message stays."""
    note = {"message": message, "time": datetime.now().astimezone().isoformat(timespec="seconds")}
    with suppress(OSError), open(folder / "failure.json", "x", encoding="utf-8") as first:
        first.write(json.dumps(note) + "\n")


def failure(folder: Path) -> str:
    """What ``note_failure`` was told first; empty if it was not told anything."""
    try:
        return str(json.loads((folder / "failure.json").read_text(encoding="utf-8"))["message"])
    except (OSError, ValueError, KeyError):
        return ""


def _hold(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        allowed = "a folder that no other run is writing"
        remedy = "wait for that run to end, or choose another run_dir"
        raise ConfigError(format_option_error("run_dir", folder, allowed, remedy)) from None
    except OSError as error:
        why = f"its file system has no locks ({error.strerror}), so see to it that no other run"
        print(f"fedtan_hpc: run_dir={folder}: {why} writes there", file=sys.stderr, flush=True)


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """A folder that cannot be written is a ``ConfigError``."""
    try:
        yield
    except OSError as error:
        allowed, remedy = "a folder that can be written", f"choose another ({error.strerror})"
        raise ConfigError(format_option_error("run_dir", folder, allowed, remedy)) from error


def finish(folder: Path, summary: Summary) -> None:
    """Write ``summary.json``, the last file of a run."""
    atomic_files.replace_text(folder / "summary.json", json.dumps(asdict(summary), indent=2) + "\n")


def _identity(config: Config) -> dict[str, Any]:
    return {key: value for key, value in to_dict(config).items() if key not in _NO_MATTER}


def _finished(folder: Path, config: Config) -> Summary | None:
    """The summary that the folder holds, if it is of ``config``."""
    if not os.path.exists(folder / "summary.json"):  # False also where it may not be looked for
        return None
    try:
        saved: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        found: Any = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        # Options and figures that a later version has brought have their defaults.
        known = {field.name for field in fields(Summary)}
        summary = Summary(**{key: value for key, value in found.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        allowed = "a new folder, or one with a whole run"
        remedy = f"its finished run cannot be read ({error}): choose another run_dir"
        raise ConfigError(
            format_option_error("run_dir", folder, allowed, " ".join(remedy.split()))
        ) from error
    if differing := differences(saved, config):
        allowed = "a new folder, or that of the same configuration"
        remedy = f"it holds a finished run with another {', '.join(differing)}: choose another"
        raise ConfigError(format_option_error("run_dir", folder, allowed, f"{remedy} run_dir"))
    return summary


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """Options in which ``config`` asks for another result than that of a run."""
    found = _differences(_completed(saved), to_dict(config))
    ignored = (*_NO_MATTER, *_WHERE)
    return sorted(option for option in found if option.partition(".")[0] not in ignored)


def _completed(saved: dict[str, Any]) -> dict[str, Any]:
    """The options of an older version with the defaults of those that have come since."""
    whole = OmegaConf.merge(OmegaConf.create(to_dict(Config())), OmegaConf.create(saved))
    return OmegaConf.to_container(whole)  # type: ignore[return-value]


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of the options that are not the same in both."""
    found = set()
    for key in a.keys() | b.keys():
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found |= _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.add(prefix + key)
    return found


def _set_aside(folder: Path) -> None:
    """Move what an unfinished run left into ``interrupted-N``."""
    # Checkpoints first: without the lines of rounds.jsonl nothing could go on from them.
    names = ("checkpoints", "config.yaml", "rounds.jsonl", "model.pt", "clients.pt")
    left = [folder / name for name in names] + list(folder.glob("events.*"))
    left = [path for path in left if path.exists()]
    if not left or left == [folder / "config.yaml"]:  # nothing had begun
        return
    numbers = itertools.count(1)
    aside = next(a for a in (folder / f"interrupted-{n}" for n in numbers) if not a.exists())
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
