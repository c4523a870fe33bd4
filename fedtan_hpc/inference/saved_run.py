"""A finished run as its folder holds it: options, summary, and the trained network.

``load_model`` is for users; ``evaluate`` and ``probe`` use the other functions too.  Nothing here
needs a process group or the data set.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ..batchnorm.conversion import revert_batchnorm
from ..config import path_options
from ..config.algorithms import ALGORITHMS
from ..config.errors import one_line
from ..config.schema import Config
from ..distributed.model_average import named_tensors
from ..evaluation import saved_records
from ..files import owners, reading, torch_files
from ..files.reading import FileError, unusable
from ..files.typed_values import fits
from ..job.saved.options import completed
from ..job.setup import DTYPES, network

_TRUST = "if you trust all who may write it, give trust=True (evaluate: trust=true)"


@dataclass(frozen=True)
class SavedRun:
    """Options and summary of the finished run in ``folder``."""

    folder: Path
    config: Config
    summary: dict[str, Any]
    """What ``summary.json`` has."""

    @property
    def has_client_models(self) -> bool:
        """Whether each client has a model of its own, not only in training."""
        return ALGORITHMS[self.config.algorithm.name].has_client_models


def load_model(
    run_dir: str | Path, client: int | None = None, *, best: bool = False, trust: bool = False
) -> nn.Module:
    """Returns the network of the finished run in the folder ``run_dir``, in evaluation mode.

    Its layers are torch's own, on the CPU; its values are in float64 after ``precision=float64``,
    else in float32.  Needs neither a process group nor the data set.

    Args:
        run_dir: the folder of a run, with config.yaml, summary.json and model.pt.
        client: the number of a client, whose own parts come from clients.pt; None for the global
            model, whose private parts have their initial values.
        best: takes best.pt, the global model of the best round, in the place of model.pt.
        trust: also takes a folder of another user, or that every user can write; its config.yaml
            may name code of yours to run with other arguments.

    Raises ``FileNotFoundError`` if the folder or a file is missing, as in an unfinished run, and
    ``ValueError`` if a file cannot be used, the network cannot be made, or there is no model of the
    client.
    """
    run = open_run(run_dir, trust)
    if client is not None and best:
        raise ValueError("best.pt is a global model: give client or best, and not both")
    kept = {} if client is None else client_states(run, client)[client]
    return model_of(run, saved_state(run, best), kept)


def open_run(folder: str | Path, trust: bool = False) -> SavedRun:
    """Reads options and summary of a finished run; raises as ``load_model``."""
    path = path_options.expanded(str(folder))
    if not os.path.lexists(path / "config.yaml"):
        raise FileNotFoundError(f"{path} is not the folder of a run: it has no config.yaml")
    if not os.path.lexists(path / "summary.json"):
        how = "start its command again, and it goes on from its newest checkpoint"
        raise FileNotFoundError(f"the run in {path} is not finished: {how}")
    if not trust:
        names = ("", "config.yaml", "summary.json", "model.pt", "best.pt", "clients.pt")
        owners.check([path / name for name in names], _TRUST)
    saved, summary = reading.read_yaml(path / "config.yaml"), saved_records.summary(path)
    try:
        structured = OmegaConf.merge(OmegaConf.structured(Config), completed(saved))
        options = OmegaConf.to_object(structured)
    except Exception as error:  # OmegaConf raises many kinds, assertions too
        why = f"its options are none of a run ({one_line(error)})"
        raise unusable(path / "config.yaml", why) from error
    assert isinstance(options, Config)
    return SavedRun(path, options, asdict(summary))


def saved_state(run: SavedRun, best: bool = False) -> dict[str, Tensor]:
    """Returns the tensors of the global model by name, of the best round or of the last one."""
    name = "best.pt" if best else "model.pt"
    if best and not (run.folder / name).exists():
        raise FileNotFoundError(f"the run in {run.folder} keeps no best.pt; leave best out")
    state: dict[str, Tensor] = _read(run.folder / name, dict[str, Tensor])
    return state


def client_states(run: SavedRun, client: int | None = None) -> dict[int, dict[str, Tensor]]:
    """Returns what each client keeps by its number; checks that ``client`` has such parts."""
    if not run.has_client_models:
        name = run.config.algorithm.name
        raise ValueError(
            f"algorithm={name} gives no client a model of its own: leave client={client} out"
        )
    states: dict[int, dict[str, Tensor]]
    states = _read(run.folder / "clients.pt", dict[int, dict[str, Tensor]])
    if client is not None and client not in states:
        numbers = ", ".join(map(str, sorted(states)))
        raise ValueError(
            f"client={client} has no model in {run.folder}: clients that took part are {numbers}"
        )
    return states


@torch.no_grad()
def model_of(run: SavedRun, state: dict[str, Tensor], kept: Mapping[str, Tensor]) -> nn.Module:
    """Returns the network of ``run`` with the values of ``state``, as ``load_model`` does.

    ``kept`` are those of a client.  They have one name for each tensor, also for one that layers
    share, and include buffers that a state_dict leaves out.
    """
    config = replace(run.config, model=replace(run.config.model, freeze=[]))
    shape, classes = _sizes(run)
    try:
        model = network(config, shape, classes).to(DTYPES[config.precision])
    except (RuntimeError, MemoryError) as error:  # as if the shape of a sample is another
        why = f"its network cannot be made ({one_line(error)})"
        raise unusable(run.folder / "summary.json", why) from error
    load_state(run, model, state)
    tensors = named_tensors(model)
    check_kept(run, tensors, kept)
    for name, value in kept.items():
        tensors[name].copy_(value)
    return revert_batchnorm(model).eval()


def load_state(run: SavedRun, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives ``model`` the values of the global model; raises ``FileError`` if they do not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise misfit(run.folder / "model.pt", one_line(error)) from error


def check_kept(run: SavedRun, tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Raises ``FileError`` if what a client has kept is not among the network's ``tensors``."""
    for name, value in kept.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise misfit(run.folder / "clients.pt", f"{name} of shape {tuple(value.shape)}")


def misfit(path: Path, why: str) -> FileError:
    """Returns the error of a file whose values the network of the run does not have."""
    found = f"its values do not fit the network that config.yaml describes ({why})"
    return unusable(path, found, "copy the folder of the run again")


def _sizes(run: SavedRun) -> tuple[Any, int]:
    """Returns shape of a sample and number of classes; older runs only have those of known data."""
    if data := run.summary.get("data"):
        return _tuples(data["shape"]), int(data["classes"])
    info = run.config.data.info()
    return info.shape, info.classes


def _tuples(shape: Any) -> Any:
    """Returns a shape, or shapes of several inputs, as they were before JSON."""
    if isinstance(shape, dict):
        return {name: _tuples(each) for name, each in shape.items()}
    return tuple(map(_tuples, shape)) if isinstance(shape, list) else shape


def _read(path: Path, kind: Any) -> Any:
    """Returns what is in a file of tensors, which has the type ``kind``."""
    try:
        content = torch_files.load(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing, which a finished run has: copy it too"
        ) from None
    if not fits(content, kind):
        raise unusable(path, "it is damaged (not the tensors of a run)", "copy it again")
    return dict(content)
