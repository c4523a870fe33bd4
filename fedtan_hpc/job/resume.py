"""Continues a run, its own or another: chooses the checkpoint, and loads it on every rank."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.algorithms import ALGORITHMS
from ..config.enums import StoppingMode
from ..config.errors import ConfigError, RunError, format_option_error
from ..config.path_options import expanded
from ..config.schema import Config, EarlyStoppingConfig
from ..config.validation.resume import may_change, misfit
from ..data.batching import Dataset
from ..distributed import collectives, process_group, structure
from ..distributed.model_average import named_tensors
from ..evaluation import best_model
from ..evaluation.early_stopping import BestEvaluation
from ..evaluation.records import RoundRecord
from ..runtime import atomic_files, launcher_env
from ..training.cohort import Cohort
from . import checkpoint_format, run_dir
from .checkpoint_format import CorruptCheckpointError
from .setup import DTYPES, network

_MODELS = ("model.pt", "best.pt", "clients.pt")
"""Files of a run that are no checkpoints."""


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that a run continues from, and the rounds before it; empty for a new run."""

    path: Path = Path()
    content: dict[str, Any] = field(default_factory=dict)
    history: list[RoundRecord] = field(default_factory=list)

    @property
    def resumed_after(self) -> list[int]:
        """Rounds after which the run was resumed, this time included."""
        return [*self.content["resumed_after"], self.content["round"]] if self.history else []

    @property
    def seconds(self) -> float:
        """Time that the run took until the checkpoint, interruptions left out."""
        return float(self.content["seconds"]) if self.history else 0.0


def load_checkpoint(folder: Path, config: Config, dataset: Dataset | None = None) -> Resumption:
    """Prepares ``folder``, which this process has claimed, and reads what the run continues from.

    ``rounds.jsonl`` then ends with the round of the checkpoint.  ``dataset`` is the user's, if it
    is not a built-in one.  Raises ``ConfigError`` for a checkpoint of another configuration that
    ``resume_change`` does not allow or that does not fit, for one that ``resume`` names and that is
    not usable, and for a finished run without a checkpoint to go on from.
    """
    with run_dir.config_error_if_unwritable(folder):
        checkpoint_format.remove_temporaries(folder)
    chosen = _choose(folder, config)
    if chosen is not None:
        _check_change(chosen[1], config, dataset)
    elif (folder / "summary.json").exists():
        allowed = "a folder with a checkpoint to go on from"
        remedy = "this finished run has none: choose another run_dir, perhaps with model.weights"
        raise ConfigError(format_option_error("run_dir", folder, allowed, remedy))
    with run_dir.config_error_if_unwritable(folder):
        if chosen is None:
            run_dir.begin(folder, config)
            return Resumption()
        path, content = chosen
        source = path.resolve().parent.parent
        records = _records(source)
        history = _history(path, records, content["round"])
        keeps_best = _is_still_best(content["config"], config, list(records.values()), history)
        is_from_elsewhere = source != folder.resolve()
        if not is_from_elsewhere:
            _rename_later(folder, content["round"], keeps_best)  # before their lines go
        run_dir.begin(folder, config, anew=is_from_elsewhere)
        if is_from_elsewhere and keeps_best and (source / best_model.NAME).exists():
            copy = partial(shutil.copyfile, source / best_model.NAME)
            atomic_files.replace(folder / best_model.NAME, copy)
        lines = "".join(json.dumps(record.line()) + "\n" for record in history)
        atomic_files.replace_text(folder / "rounds.jsonl", lines)
    return Resumption(path, content, history)


def restore(resumption: Resumption, cohort: Cohort) -> Resumption:
    """Loads the checkpoint of rank 0's ``resumption`` on every rank, and returns it there.

    Raises ``RunError`` on every rank if one cannot read the files of the clients' states.
    """
    resumption = collectives.broadcast_object(resumption)
    content = resumption.content
    if resumption.history:
        cohort.load_state_dict(content)
        torch.set_rng_state(content["rng"][0])
        ranks = process_group.world_size()
        owners = {client: rank % ranks for client, rank in content["owners"].items()}
        cohort.states.load_state_dict(_read_shards(resumption), owners)
    return resumption


def _read_shards(resumption: Resumption) -> dict[int, Tensor]:
    """Returns states by client from the files of this rank, and of ranks that no longer exist.

    On fewer ranks than before, rank r also takes the files of the ranks r + W, r + 2 W, ...
    """
    rank, ranks = process_group.rank(), process_group.world_size()
    states: dict[int, Tensor] = {}
    failure = ""
    try:
        for digests in resumption.content["shards"][rank::ranks]:
            for shard in checkpoint_format.read_shards(resumption.path, digests):
                states.update(zip(shard["clients"], shard["states"], strict=True))
    except (CorruptCheckpointError, OSError) as error:
        failure = f"rank {rank}: {error}; every rank must see the folder of the run"
    if failures := [each for each in collectives.all_gather_object(failure) if each]:
        raise RunError(failures[0], on_all_ranks=True)
    return states


def _choose(folder: Path, config: Config) -> tuple[Path, dict[str, Any]] | None:
    """Follows ``resume``, but a run that its launcher has restarted continues if it can."""
    if config.resume == "auto" or launcher_env.restart_count() > 0:
        chosen = _newest_whole(folder, renames=True)
        if chosen is not None:
            _check_same(chosen[1], config, f"{chosen[0]} is")
            return chosen
    if config.resume in ("auto", "never"):
        return None
    return _choose_named(expanded(config.resume), config)


def _choose_named(path: Path, config: Config) -> tuple[Path, dict[str, Any]]:
    """Reads the checkpoint at ``path``, or the newest whole one of the run in that folder."""
    why = "none is there"
    if path.name == checkpoint_format.FOLDER and path.is_dir():
        path = path.resolve().parent
    if path.name in _MODELS and path.is_file():
        allowed = "auto, never, a checkpoint, or the folder of a run"
        remedy = f"name the folder {path.parent} to go on"
        if path.name != "clients.pt":
            remedy += f", or start anew from its weights with model.weights={path}"
        raise ConfigError(format_option_error("resume", path, allowed, remedy))
    try:
        chosen = _newest_whole(path) if path.is_dir() else (path, _read(path))
    except CorruptCheckpointError as error:
        chosen, why = None, str(error)
    if chosen is None:
        allowed = "auto, never, or a whole checkpoint: a file, or the folder of a run that has one"
        raise ConfigError(format_option_error("resume", path, allowed, f"choose another ({why})"))
    _check_same(chosen[1], config, "it is")
    return chosen


def _newest_whole(folder: Path, renames: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """Reads the newest whole checkpoint; names damaged ones, and ``renames`` them if asked to."""
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
        if "shards" not in content:
            why = f"has the states of some clients only; name {path.name.partition('.')[0]}.pt"
            raise CorruptCheckpointError(f"{path}: {why}")
        for digests in content["shards"]:
            for shard in checkpoint_format.read_shards(path, digests):
                del shard  # reading it has checked it
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"{error.filename}: is missing") from error
    except OSError as error:
        allowed, remedy = "a checkpoint that can be read", f"try again later ({error.strerror})"
        raise ConfigError(format_option_error("resume", path, allowed, remedy)) from error
    return content


def _check_same(content: dict[str, Any], config: Config, which: str) -> None:
    """Checks that options differ from those of the checkpoint only as ``resume_change`` allows."""
    differing = run_dir.differences(content["config"], config)
    if refused := [each for each in differing if not may_change(each, config.resume_change)]:
        allowed = "a checkpoint of the same configuration"
        remedy = f"{which} of a run with another {', '.join(differing)}: give these options the "
        remedy += f"values of that run, or {run_dir.how_to_change(refused, config)}, or "
        remedy += "resume=never, or another run_dir"
        raise ConfigError(format_option_error("resume", config.resume, allowed, remedy))


def _check_change(content: dict[str, Any], config: Config, dataset: Dataset | None) -> None:
    """Checks that the state of a run with other options fits ``config``, and is not its end."""
    if not run_dir.differences(content["config"], config):
        return
    if config.rounds <= content["round"]:
        allowed = f"more than {content['round']}, the rounds that the resumed run has trained"
        remedy = f"try rounds={2 * content['round']} resume_change=[rounds]"
        raise ConfigError(format_option_error("rounds", config.rounds, allowed, remedy))
    saved = run_dir.completed(content["config"])
    keeps_state = bool(content.get("optimizer") or content.get("momentum"))
    why = misfit(saved, config, content["owners"], keeps_state)
    if why := why or _model_misfit(content["model"], config, dataset):
        allowed = "names of options whose new values fit the state of the resumed run"
        text = f"[{','.join(config.resume_change)}]"
        remedy = f"give it the value of that run ({why})"
        raise ConfigError(format_option_error("resume_change", text, allowed, remedy))


def _model_misfit(saved: Mapping[str, Tensor], config: Config, dataset: Dataset | None) -> str:
    """Returns the first tensor by which the network of ``config`` differs from the saved one."""
    info = dataset or config.data.info()
    model = network(config, info.shape, info.classes).to(DTYPES[config.precision])
    old, new = structure.described(saved), structure.described(named_tensors(model))
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name, "absent"), new.get(name, "absent")
        if before != now:
            return f"{name} of the network is {now}, and {before} in the checkpoint"
    return ""


def _records(folder: Path) -> dict[int, RoundRecord]:
    """Returns the lines of the folder's ``rounds.jsonl`` by round, ascending."""
    source = folder / "rounds.jsonl"
    records: dict[int, RoundRecord] = {}
    for line in source.read_text(encoding="utf-8").splitlines() if source.exists() else []:
        try:
            record = RoundRecord.of_line(json.loads(line))
        except (ValueError, TypeError, AttributeError):
            continue  # a line that was being written when the run ended
        records[record.round] = record
    return dict(sorted(records.items()))


def _history(path: Path, records: Mapping[int, RoundRecord], number: int) -> list[RoundRecord]:
    """Returns the records of the rounds until ``number``, that of the checkpoint ``path``."""
    missing = [each for each in range(1, number + 1) if each not in records]
    if missing:
        source = path.resolve().parent.parent / "rounds.jsonl"
        allowed = "a checkpoint in the folder of its run, beside rounds.jsonl"
        remedy = f"{source} has no round {missing[0]}: begin anew with resume=never"
        raise ConfigError(format_option_error("resume", path, allowed, remedy))
    return [records[each] for each in range(1, number + 1)]


def _is_still_best(
    saved: dict[str, Any],
    config: Config,
    records: Sequence[RoundRecord],
    history: Sequence[RoundRecord],
) -> bool:
    """Returns whether best.pt is the model of the best round of ``history`` by ``config``.

    It is that of all ``records``, by the ``saved`` options: also by rounds that are trained again,
    perhaps with other options.  Nothing is best where clients have models of their own.
    """
    options = dict(run_dir.completed(saved)["early_stopping"])
    before = EarlyStoppingConfig(**options | {"mode": StoppingMode(options["mode"])})
    best = BestEvaluation(config.early_stopping, history)
    has_client_models = ALGORITHMS[config.algorithm.name].has_client_models
    return not has_client_models and BestEvaluation(before, records).round == best.round


def _rename_later(folder: Path, number: int, keeps_best: bool) -> None:
    """Renames checkpoints after ``number``: their rounds are trained again.  So may be best.pt."""
    for path in checkpoint_format.existing(folder):
        if checkpoint_format.round_of(path) > number:
            path.rename(path.with_suffix(".abandoned"))
    best = folder / best_model.NAME
    if best.exists() and not keeps_best:
        best.rename(best.with_suffix(".abandoned"))
