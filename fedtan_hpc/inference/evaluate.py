"""The figures of a finished run's model on a test set, by the code that evaluates in a job.

The command ``python -m fedtan_hpc.evaluate`` uses it, on one process.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config.errors import ConfigError, format_option_error, one_line
from ..config.schema import Config
from ..data import datasets, download, loading
from ..data.batching import Dataset, Moments, Samples
from ..data.client_store import ClientStore
from ..data.loading import EvaluationSamples, Reader
from ..evaluation import metrics
from ..job.setup import DTYPES
from ..runtime import device, launcher_env
from ..tasks.objective import Objective
from . import saved_run
from .saved_run import SavedRun

Model = tuple[int | None, nn.Module]
"""A client's model with its number, or the global one with None."""


def models_of(
    run: SavedRun, client: int | None, best: bool, trust: bool = False
) -> Iterator[Model]:
    """Yields the model that is asked for; without a wish those of all clients that have such.

    Raises as ``saved_run.load_model``.
    """
    if client is not None or best or not run.has_client_models:
        yield client, saved_run.load_model(run.folder, client, best=best, trust=trust)
        return
    shared = saved_run.saved_state(run)
    for number, kept in saved_run.client_states(run).items():
        yield number, saved_run.model_of(run, shared, kept)


def evaluate(run: SavedRun, config: Config, models: Sequence[Model]) -> dict[str, Any]:
    """Returns what was evaluated and its figures, means over ``models``, by name.

    ``config`` are the options of ``run`` with those of other data.  Raises ``ConfigError`` if data
    and network do not fit.
    """
    placement = device.choose(config, launcher_env.detect())
    torch.set_num_threads(placement.threads)
    download.fetch(config.data)
    dataset = datasets.load(config.data, config.seed, config.task)
    if dataset.begin_reading is not None:
        dataset.begin_reading()
    _check_classes(run, config, dataset)
    samples = _test_samples(run, config, dataset, placement.device)
    with device.tensor_float(config.tf32):
        rows = [_figures(model.to(placement.device), samples, config) for _, model in models]
    figures = {name: _mean([row[name] for row in rows]) for name in rows[0]}
    which = "global model" if models[0][0] is None else f"client {models[0][0]}"
    if len(models) > 1:
        which = f"mean over the models of {len(models)} clients"
    return {"model": which, "samples": len(dataset.test), **figures}


def _mean(values: Sequence[Any]) -> Any:
    """Returns the mean of numbers or, element by element, of lists; None where none is known."""
    if isinstance(values[0], list):
        return [_mean(each) for each in zip(*values, strict=True)]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _figures(model: nn.Module, samples: Any, config: Config) -> dict[str, Any]:
    """Returns the figures of ``model`` by the names of rounds.jsonl."""
    try:
        result = metrics.evaluate(model, samples, Objective.of(config))
    except Exception as error:  # a network may raise anything for samples of another shape
        allowed = "data whose samples the network of the run takes"
        name = config.data.name
        message = format_option_error("data.name", name, allowed, one_line(error))
        raise ConfigError(message) from error
    return {"test_loss": result.loss, **result.recorded("test_")}


def _test_samples(
    run: SavedRun, config: Config, dataset: Dataset, place: torch.device
) -> "_Renormalised":
    """Returns the test samples, normalised as in the run, with the clients' feature shift."""
    reader = Reader(dataset, place, DTYPES[config.precision], loading.workers_of(config))
    # The store knows clients for their shift alone; nothing reads their training samples.
    partition = [dataset.train[:1]] * config.clients
    store = ClientStore(dataset, partition, reader, config, is_streamed=True)
    samples = store.test_samples(dataset.test, np.arange(len(dataset.test)))
    found = run.summary.get("data", {}).get("normalisation")
    return _Renormalised(samples, dataset.moments(), None if found is None else Moments(**found))


def _check_classes(run: SavedRun, config: Config, dataset: Dataset) -> None:
    expected = run.summary.get("data", {})
    classes, names = expected.get("classes"), expected.get("class_names")
    if classes is not None and dataset.classes != classes:
        allowed, found = f"data with the {classes} classes of the run", str(dataset.classes)
    elif names and dataset.names and list(names) != list(dataset.names):
        allowed = f"data with the classes of the run, {', '.join(names[:5])}"
        found = ", ".join(list(dataset.names)[:5])
    else:
        return
    remedy = f"choose others, for these have {found}"
    raise ConfigError(format_option_error("data.name", config.data.name, allowed, remedy))


@dataclass(frozen=True)
class _Renormalised:
    """Samples with another mean and deviation by channel than those they are read with."""

    samples: EvaluationSamples
    before: Moments | None
    """By what the data are normalised when they are read."""
    after: Moments | None
    """By what the run normalised; None if its inputs were as they are."""

    def __iter__(self) -> Iterator[Samples]:
        has_other = None not in (self.before, self.after) and self.before != self.after
        for batch in self.samples:
            yield batch.map_inputs(self._changed) if has_other else batch

    def _changed(self, values_NCHW: Tensor) -> Tensor:
        assert self.before is not None
        assert self.after is not None
        mean, deviation, new_mean, new_deviation = (
            torch.tensor(numbers).to(values_NCHW).view(-1, 1, 1)
            for numbers in (*self.before, *self.after)
        )
        return (values_NCHW * deviation + mean - new_mean) / new_deviation
