"""Going on with an interrupted run: from which checkpoint, and with which rounds behind it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..config.errors import ConfigError, RunError, format_option_error
from ..config.schema import Config
from ..distributed import collectives, process_group
from ..evaluation.records import RoundRecord
from ..runtime import atomic_files, launcher_env
from ..training.cohort import Cohort
from . import checkpoint_format, run_dir
from .checkpoint_format import CorruptCheckpointError


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that a run goes on from, and the rounds until then."""

    path: Path
    content: dict[str, Any]
    history: list[RoundRecord]

    def resumed_after(self) -> list[int]:
        """Rounds after which the run was taken up, this time included."""
        return [*self.content["resumed_after"], self.content["round"]]


def load_checkpoint(folder: Path, config: Config) -> Resumption | None:
    """What the run in ``folder``, which is held, goes on from; None if it begins anew.

    ``rounds.jsonl`` then ends with the checkpoint's round.  Raises ``ConfigError`` for a checkpoint
    of another configuration, or one that is asked for by name and cannot be had.
    """
    with run_dir.written(folder):
        checkpoint_format.remove_temporaries(folder)
    found = _chosen(folder, config)
    with run_dir.written(folder):
        if found is None:
            run_dir.begin(folder, config)
            return None
        path, content = found
        history = _history(path, content["round"])
        begins_elsewhere = path.resolve().parent != (folder / checkpoint_format.FOLDER).resolve()
        if not begins_elsewhere:
            _rename_later(folder, content["round"])  # before the lines that they stand for go
        run_dir.begin(folder, config, anew=begins_elsewhere)
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in history)
        atomic_files.replace_text(folder / "rounds.jsonl", lines)
    return Resumption(path, content, history)


def _chosen(folder: Path, config: Config) -> tuple[Path, dict[str, Any]] | None:
    """A launcher that starts a run again means it to go on, whatever ``resume`` says."""
    how = config.resume
    again = launcher_env.restarts() > 0 and bool(checkpoint_format.existing(folder))
    if how not in ("auto", "never") and not again:
        return _asked_for(Path(how), config)
    if how == "never" and not launcher_env.restarts():
        return None
    found = _whole(folder, renames=True)
    if found is not None:
        _check_same(found[1], config, f"{found[0]} is")
    return found


def _asked_for(path: Path, config: Config) -> tuple[Path, dict[str, Any]]:
    """The checkpoint at ``path``, or the newest whole one of the run there."""
    allowed = "auto, never, or a whole checkpoint: a file, or the folder of a run that has one"
    try:
        found = _whole(path) if path.is_dir() else (path, _read(path))
    except CorruptCheckpointError as error:
        raise ConfigError(
            format_option_error("resume", path, allowed, f"choose another ({error})")
        ) from error
    if found is None:
        raise ConfigError(
            format_option_error("resume", path, allowed, "choose another (none is there)")
        )
    _check_same(found[1], config, "it is")
    return found


def _whole(folder: Path, renames: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint; damaged ones are named, and in one's own folder renamed."""
    for path in checkpoint_format.existing(folder):
        try:
            return path, _read(path)
        except CorruptCheckpointError as error:
            print(f"fedtan_hpc: damaged checkpoint {error}", file=sys.stderr, flush=True)
            if renames:
                path.rename(path.with_suffix(".damaged"))
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = checkpoint_format.read(path)
        for name in content["shards"]:
            checkpoint_format.read_shard(path, name, content)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"{error.filename}: is missing") from error
    except OSError as error:
        allowed, remedy = "a checkpoint that can be read", f"try again later ({error.strerror})"
        raise ConfigError(format_option_error("resume", path, allowed, remedy)) from error
    return content


def _check_same(content: dict[str, Any], config: Config, which: str) -> None:
    if differing := run_dir.differences(content["config"], config):
        allowed = "a checkpoint of the same configuration"
        remedy = f"{which} of a run with another {', '.join(differing)}: set those options as there"
        remedy += ", or resume=never, or another run_dir"
        raise ConfigError(format_option_error("resume", config.resume, allowed, remedy))


def _history(path: Path, number: int) -> list[RoundRecord]:
    """The lines of ``rounds.jsonl`` until round ``number``, each once."""
    source = path.resolve().parent.parent / "rounds.jsonl"
    known = {field.name for field in fields(RoundRecord)}
    records: dict[int, RoundRecord] = {}
    for line in source.read_text(encoding="utf-8").splitlines() if source.exists() else []:
        try:
            values = {key: value for key, value in json.loads(line).items() if key in known}
            record = RoundRecord(**values)
        except (ValueError, TypeError, AttributeError):
            continue  # a line that was being written when the run ended
        records[record.round] = record
    missing = [each for each in range(1, number + 1) if each not in records]
    if missing:
        allowed = "a checkpoint in the folder of its run, beside rounds.jsonl"
        remedy = f"{source} has no round {missing[0]}: begin anew with resume=never"
        raise ConfigError(format_option_error("resume", path, allowed, remedy))
    return [records[each] for each in range(1, number + 1)]


def _rename_later(folder: Path, number: int) -> None:
    """Checkpoints after ``number`` are of rounds that are now trained again."""
    for path in checkpoint_format.existing(folder):
        if checkpoint_format.round_of(path) > number:
            path.rename(path.with_suffix(".abandoned"))


def restore(taken: Resumption | None, cohort: Cohort) -> None:
    """Give every rank its part of what rank 0 has ``taken`` up.

    Raises ``RunError`` if the clients' states are in files that a rank cannot read.
    """
    content = collectives.broadcast_object(
        _without_states(taken) if process_group.rank() == 0 else None
    )
    cohort.recall(content)
    torch.set_rng_state(content["rng"][0])
    states, owners = cohort.states, content["owners"]
    if content["shards"]:
        standing = {client: owner % process_group.world_size() for client, owner in owners.items()}
        states.recall(*_of_shards(content), standing)
        return
    at_first = dict.fromkeys(owners, 0)
    if taken is not None:  # rank 0
        states.recall(taken.content["clients"], taken.content["states"], at_first)
    else:
        states.recall([], torch.empty(0), at_first)
    states.move(_by_rank(owners), training=False)


def _without_states(taken: Resumption | None) -> dict[str, Any]:
    assert taken is not None
    return {**taken.content, "states": None, "path": str(taken.path)}


def _by_rank(owners: dict[int, int]) -> list[list[int]]:
    """Clients by the rank that had them, or, where ranks are fewer now, that stands for it."""
    ranks = process_group.world_size()
    hosted: list[list[int]] = [[] for _ in range(ranks)]
    for client, owner in sorted(owners.items()):
        hosted[owner % ranks].append(client)
    return hosted


def _of_shards(content: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
    """The states of this rank, read from the files of the ranks that it stands for."""
    path = Path(content["path"])
    mine = [
        name
        for name in content["shards"]
        if _rank_of(name) % process_group.world_size() == process_group.rank()
    ]
    failure, parts = "", []
    try:
        parts = [checkpoint_format.read_shard(path, name, content) for name in mine]
    except (CorruptCheckpointError, OSError) as error:
        failure = f"rank {process_group.rank()}: {error}; every rank must see the folder of the run"
    if failures := [each for each in collectives.all_gather_object(failure) if each]:
        raise RunError(failures[0], on_all_ranks=True)
    return [c for part in parts for c in part["clients"]], torch.cat(
        [part["states"] for part in parts] or [torch.empty(0)]
    )


def _rank_of(shard: str) -> int:
    return int(shard.split(".states-")[1].split("-")[0])
