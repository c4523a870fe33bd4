"""A finished run as its folder holds it: options, summary, and the trained network.

``load_model`` is for users; ``evaluate`` uses the other functions too.  Nothing here needs a
process group or the data set.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from ..batchnorm.conversion import revert_batchnorm
from ..config import path_options
from ..config.algorithms import ALGORITHMS
from ..config.errors import one_line
from ..config.schema import Config
from ..distributed.model_average import named_tensors
from ..job import run_dir as run_folder
from ..job.setup import DTYPES, network


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


def load_model(run_dir: str | Path, client: int | None = None, *, best: bool = False) -> nn.Module:
    """Returns the network of the finished run in the folder ``run_dir``, in evaluation mode.

    Its layers are torch's own, on the CPU; its values are in float64 after ``precision=float64``,
    else in float32.  Needs neither a process group nor the data set.

    Args:
        run_dir: the folder of a run, with config.yaml, summary.json and model.pt.
        client: the number of a client, whose own parts come from clients.pt; None for the global
            model, whose private parts have their initial values.
        best: takes best.pt, the global model of the best round, in the place of model.pt.

    Raises ``FileNotFoundError`` if the folder or a file is missing, as in an unfinished run, and
    ``ValueError`` if a file cannot be used, the network cannot be made, or there is no model of the
    client.
    """
    run = open_run(run_dir)
    if client is not None and best:
        raise ValueError("best.pt is a global model: give client or best, and not both")
    kept = {} if client is None else client_states(run, client)[client]
    return model_of(run, saved_state(run, best), kept)


def open_run(folder: str | Path) -> SavedRun:
    """Reads options and summary of a finished run; raises as ``load_model``."""
    path = path_options.expanded(str(folder))
    if not (path / "config.yaml").is_file():
        raise FileNotFoundError(f"{path} is not the folder of a run: it has no config.yaml")
    if not (path / "summary.json").is_file():
        how = "start its command again, and it goes on from its newest checkpoint"
        raise FileNotFoundError(f"the run in {path} is not finished: {how}")
    try:
        saved = run_folder.completed(OmegaConf.to_container(OmegaConf.load(path / "config.yaml")))
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved))
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (ValueError, TypeError, AttributeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"the run in {path} cannot be read: {one_line(error)}") from error
    assert isinstance(options, Config)
    return SavedRun(path, options, summary)


def saved_state(run: SavedRun, best: bool = False) -> dict[str, Tensor]:
    """Returns the tensors of the global model by name, of the best round or of the last one."""
    name = "best.pt" if best else "model.pt"
    if best and not (run.folder / name).exists():
        raise FileNotFoundError(f"the run in {run.folder} keeps no best.pt; leave best out")
    return dict(_read(run.folder / name))


def client_states(run: SavedRun, client: int | None = None) -> dict[int, dict[str, Tensor]]:
    """Returns what each client keeps by its number; checks that ``client`` has such parts."""
    if not run.has_client_models:
        name = run.config.algorithm.name
        raise ValueError(
            f"algorithm={name} gives no client a model of its own: leave client={client} out"
        )
    states = _read(run.folder / "clients.pt")
    if client is not None and client not in states:
        numbers = ", ".join(map(str, sorted(states)))
        raise ValueError(
            f"client={client} has no model in {run.folder}: clients that took part are {numbers}"
        )
    return dict(states)


@torch.no_grad()
def model_of(run: SavedRun, state: dict[str, Tensor], kept: Mapping[str, Tensor]) -> nn.Module:
    """Returns the network of ``run`` with the values of ``state``, as ``load_model`` does.

    ``kept`` are those of a client.  They have one name for each tensor, also for one that layers
    share, and include buffers that a state_dict leaves out.
    """
    config = replace(run.config, model=replace(run.config.model, freeze=[]))
    shape, classes = _sizes(run)
    model = network(config, shape, classes).to(DTYPES[config.precision])
    try:
        model.load_state_dict(state)
        tensors = named_tensors(model)
        for name, value in kept.items():
            tensors[name].copy_(value)
    except (RuntimeError, KeyError) as error:
        why = f"its values do not fit the network that config.yaml describes ({one_line(error)})"
        raise ValueError(f"the run in {run.folder} cannot be used: {why}") from error
    return revert_batchnorm(model).eval()


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


def _read(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, which a finished run has: copy it too")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for a damaged file
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error
