"""Going on with an interrupted run: from which checkpoint, and with which rounds behind it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, comm, environment, files, run_folder
from .checkpoint import Damaged
from .cohort import Cohort
from .config import Config
from .errors import ConfigError, RunError, mistake
from .metrics import RoundRecord


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that a run goes on from, and the rounds until then."""

    path: Path
    content: dict[str, Any]
    history: list[RoundRecord]

    def resumed_after(self) -> list[int]:
        """Rounds after which the run was taken up, this time included."""
        return [*self.content["resumed_after"], self.content["round"]]


def take_up(folder: Path, config: Config) -> Resumption | None:
    """What the run in ``folder``, which is held, goes on from; None if it begins anew.

    ``rounds.jsonl`` then ends with the checkpoint's round.  Raises ``ConfigError`` for a checkpoint
    of another configuration, or one that is asked for by name and cannot be had.
    """
    with run_folder.written(folder):
        checkpoint.remove_temporaries(folder)
    found = _chosen(folder, config)
    with run_folder.written(folder):
        if found is None:
            run_folder.begin(folder, config)
            return None
        path, content = found
        history = _history(path, content["round"])
        begins_elsewhere = path.resolve().parent != (folder / checkpoint.FOLDER).resolve()
        if not begins_elsewhere:
            _rename_later(folder, content["round"])  # before the lines that they stand for go
        run_folder.begin(folder, config, anew=begins_elsewhere)
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in history)
        files.replace_text(folder / "rounds.jsonl", lines)
    return Resumption(path, content, history)


def _chosen(folder: Path, config: Config) -> tuple[Path, dict[str, Any]] | None:
    """A launcher that starts a run again means it to go on, whatever ``resume`` says."""
    how = config.resume
    again = environment.restarts() > 0 and bool(checkpoint.existing(folder))
    if how not in ("auto", "never") and not again:
        return _asked_for(Path(how), config)
    if how == "never" and not environment.restarts():
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
    except Damaged as error:
        raise ConfigError(mistake("resume", path, allowed, f"choose another ({error})")) from error
    if found is None:
        raise ConfigError(mistake("resume", path, allowed, "choose another (none is there)"))
    _check_same(found[1], config, "it is")
    return found


def _whole(folder: Path, renames: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint; damaged ones are named, and in one's own folder renamed."""
    for path in checkpoint.existing(folder):
        try:
            return path, _read(path)
        except Damaged as error:
            print(f"fedtan_hpc: damaged checkpoint {error}", file=sys.stderr, flush=True)
            if renames:
                path.rename(path.with_suffix(".damaged"))
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = checkpoint.read(path)
        for name in content["shards"]:
            checkpoint.read_shard(path, name, content)
    except FileNotFoundError as error:
        raise Damaged(f"{error.filename}: is missing") from error
    except OSError as error:
        allowed, remedy = "a checkpoint that can be read", f"try again later ({error.strerror})"
        raise ConfigError(mistake("resume", path, allowed, remedy)) from error
    return content


def _check_same(content: dict[str, Any], config: Config, which: str) -> None:
    if differing := run_folder.differences(content["config"], config):
        allowed = "a checkpoint of the same configuration"
        remedy = f"{which} of a run with another {', '.join(differing)}: set those options as there"
        remedy += ", or resume=never, or another run_dir"
        raise ConfigError(mistake("resume", config.resume, allowed, remedy))


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
        raise ConfigError(mistake("resume", path, allowed, remedy))
    return [records[each] for each in range(1, number + 1)]


def _rename_later(folder: Path, number: int) -> None:
    """Checkpoints after ``number`` are of rounds that are now trained again."""
    for path in checkpoint.existing(folder):
        if checkpoint.round_of(path) > number:
            path.rename(path.with_suffix(".abandoned"))


def restore(taken: Resumption | None, cohort: Cohort) -> None:
    """Give every rank its part of what rank 0 has ``taken`` up.

    Raises ``RunError`` if the clients' states are in files that a rank cannot read.
    """
    content = comm.broadcast_object(_without_states(taken) if comm.rank() == 0 else None)
    cohort.recall(content)
    torch.set_rng_state(content["rng"][0])
    states, owners = cohort.states, content["owners"]
    if content["shards"]:
        standing = {client: owner % comm.world_size() for client, owner in owners.items()}
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
    ranks = comm.world_size()
    hosted: list[list[int]] = [[] for _ in range(ranks)]
    for client, owner in sorted(owners.items()):
        hosted[owner % ranks].append(client)
    return hosted


def _of_shards(content: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
    """The states of this rank, read from the files of the ranks that it stands for."""
    path = Path(content["path"])
    mine = [name for name in content["shards"] if _rank_of(name) % comm.world_size() == comm.rank()]
    failure, parts = "", []
    try:
        parts = [checkpoint.read_shard(path, name, content) for name in mine]
    except (Damaged, OSError) as error:
        failure = f"rank {comm.rank()}: {error}; every rank must see the folder of the run"
    if failures := [each for each in comm.all_gather_object(failure) if each]:
        raise RunError(failures[0], on_all_ranks=True)
    return [c for part in parts for c in part["clients"]], torch.cat(
        [part["states"] for part in parts] or [torch.empty(0)]
    )


def _rank_of(shard: str) -> int:
    return int(shard.split(".states-")[1].split("-")[0])
