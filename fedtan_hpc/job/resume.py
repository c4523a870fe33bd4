"""Continues a run, its own or another: chooses the checkpoint, and loads it on every rank."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.algorithms import ALGORITHMS
from ..config.enums import StoppingMode
from ..config.errors import ConfigError, RunError, format_option_error
from ..config.path_options import expanded
from ..config.schema import Config, EarlyStoppingConfig, to_dict
from ..config.validation.resume import may_change, misfit
from ..data.batching import Dataset
from ..distributed import collectives, process_group, structure
from ..distributed.model_average import named_tensors
from ..evaluation import best_model, probe_records, saved_records, trackers
from ..evaluation.early_stopping import BestEvaluation
from ..evaluation.probe_records import ProbeRecord
from ..evaluation.records import RoundRecord
from ..files import atomic_files, reading
from ..files.reading import FileError
from ..probing import schedule
from ..runtime import launcher_env
from ..training.cohort import Cohort
from . import checkpoint_format, run_dir
from .checkpoint_format import CorruptCheckpointError
from .saved import checkpoint_content
from .saved.options import completed
from .setup import DTYPES, network

_MODELS = ("model.pt", "best.pt", "clients.pt")
"""Files of a run that are no checkpoints."""


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that a run continues from, and the rounds before it; empty for a new run."""

    path: Path = Path()
    content: dict[str, Any] = field(default_factory=dict)
    history: list[RoundRecord] = field(default_factory=list)
    probes: list[ProbeRecord] = field(default_factory=list)
    """Of those rounds that were probed."""
    layers: list[str] | None = None
    """What a saved probe has chosen, if one has."""

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
    run_dir.check_free(folder)
    run_dir.check_trusted(folder, config)  # also of a new run, which may have to go on
    trackers.saved_ids(folder)
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
        records = {each.round: each for each in saved_records.rounds(source, skips_damaged=True)}
        records = dict(sorted(records.items()))
        history = _history(path, records, content["round"])
        keeps_best = _is_still_best(content["config"], config, list(records.values()), history)
        is_from_elsewhere = source != folder.resolve()
        if not is_from_elsewhere:
            _rename_later(folder, content["round"], keeps_best)  # before their lines go
        run_dir.begin(folder, config, anew=is_from_elsewhere)
        if is_from_elsewhere and keeps_best and (source / best_model.NAME).exists():
            best = reading.read_bytes(source / best_model.NAME)
            atomic_files.replace(folder / best_model.NAME, lambda new: new.write_bytes(best))
        lines = "".join(json.dumps(record.line()) + "\n" for record in history)
        probes = probe_records.carried(source, folder, content["round"])
        atomic_files.replace_text(folder / "rounds.jsonl", lines)
    return Resumption(path, content, history, probes, schedule.read_choice(source))


def restore(resumption: Resumption, cohort: Cohort) -> Resumption:
    """Loads the checkpoint of rank 0's ``resumption`` on every rank, and returns it there.

    Raises ``ConfigError`` on every rank for a state that does not fit the network, and ``RunError``
    if a rank cannot read the files of the clients' states.
    """
    resumption = collectives.broadcast_object(resumption)
    content = resumption.content
    if resumption.history:
        if why := cohort.state_misfit(content):
            remedy = f"remove {resumption.path} or begin anew with resume=never ({why})"
            allowed = "a checkpoint whose state fits the network"
            error = ConfigError(format_option_error("resume", resumption.path, allowed, remedy))
            error.on_all_ranks = True
            raise error
        cohort.load_state_dict(content)
        torch.set_rng_state(content["rng"][0])
        ranks = process_group.world_size()
        owners = {client: rank % ranks for client, rank in content["owners"].items()}
        states = _read_shards(resumption, cohort.states.size)
        cohort.states.load_state_dict(states, owners)
    return resumption


def _read_shards(resumption: Resumption, size: int) -> dict[int, Tensor]:
    """Returns states by client from the files of this rank, and of ranks that no longer exist.

    Each state has ``size`` values.
    On fewer ranks than before, rank r also takes the files of the ranks r + W, r + 2 W, ...
    """
    rank, ranks = process_group.rank(), process_group.world_size()
    states: dict[int, Tensor] = {}
    failure = ""
    try:
        for digests in resumption.content["shards"][rank::ranks]:
            for shard in checkpoint_format.read_shards(resumption.path, digests):
                if (found := shard["states"].shape[1]) != size:
                    why = f"a client's state has {found} values, and here {size}"
                    raise CorruptCheckpointError(f"{resumption.path}: {why}")
                states.update(zip(shard["clients"], shard["states"], strict=True))
    except (CorruptCheckpointError, FileError, OSError) as error:
        failure = f"rank {rank}: {error}; every rank must see the folder of the run"
    if failures := [each for each in collectives.all_gather_object(failure) if each]:
        raise RunError(failures[0], on_all_ranks=True)
    return states


def _choose(folder: Path, config: Config) -> tuple[Path, dict[str, Any]] | None:
    """Follows ``resume``, but a run that its launcher has restarted continues if it can."""
    if config.resume == "auto" or launcher_env.restart_count() > 0:
        chosen = _newest_whole(folder, config, renames=True)
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
        if path.is_dir():
            chosen = _newest_whole(path, config)
        else:
            run_dir.check_trusted(path.resolve().parent.parent, config)
            chosen = path, _read(path)
    except CorruptCheckpointError as error:
        chosen, why = None, str(error)
    if chosen is None:
        allowed = "auto, never, or a whole checkpoint: a file, or the folder of a run that has one"
        raise ConfigError(format_option_error("resume", path, allowed, f"choose another ({why})"))
    _check_same(chosen[1], config, "it is")
    return chosen


def _newest_whole(
    folder: Path, config: Config, renames: bool = False
) -> tuple[Path, dict[str, Any]] | None:
    """Reads the newest whole checkpoint; names damaged ones, and ``renames`` them if asked to."""
    paths = checkpoint_format.existing(folder)
    if paths:
        run_dir.check_trusted(folder, config)
    for path in paths:
        try:
            return path, _read(path)
        except CorruptCheckpointError as error:
            print(f"fedtan_hpc: damaged checkpoint {error}", file=sys.stderr, flush=True)
            if renames:
                with run_dir.config_error_if_unwritable(folder):
                    path.rename(path.with_suffix(".damaged"))
    return None


def _read(path: Path) -> dict[str, Any]:
    """Reads a checkpoint and all its shards; raises ``CorruptCheckpointError``, ``ConfigError``."""
    try:
        content = checkpoint_format.read(path)
        if "shards" not in content and "states" in content:
            why = f"has the states of some clients only; name {path.name.partition('.')[0]}.pt"
            raise CorruptCheckpointError(f"{path}: {why}")
        if why := checkpoint_content.misfit(path, content):
            raise CorruptCheckpointError(f"{path}: {why}")
        if why := checkpoint_content.shards_misfit(path, content):
            raise CorruptCheckpointError(why)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"{error.filename}: is missing") from error
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
    saved = completed(content["config"])
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
    return structure.difference(saved, named_tensors(model))


def _history(path: Path, records: Mapping[int, RoundRecord], number: int) -> list[RoundRecord]:
    """Returns the records of the rounds until ``number``, that of the checkpoint ``path``."""
    missing = next((each for each in range(1, number + 1) if each not in records), None)
    if missing is not None:
        source = path.resolve().parent.parent / "rounds.jsonl"
        allowed = "a checkpoint in the folder of its run, beside rounds.jsonl"
        remedy = f"{source} has no round {missing}: begin anew with resume=never"
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
    options, known = completed(saved)["early_stopping"], to_dict(config)["early_stopping"]
    values = {name: options[name] for name in known} | {"mode": StoppingMode(options["mode"])}
    before = EarlyStoppingConfig(**values)
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
