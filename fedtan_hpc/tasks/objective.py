"""The loss of a task on what a network returns.  Used by ``training``, ``evaluation`` and ``job``.

Shapes: N samples.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..config.enums import TaskName
from ..config.errors import ConfigError, format_option_error, one_line
from ..config.schema import Config, TaskConfig
from ..models.outputs import PLAIN_READER, OutputReader, applied
from ..runtime import import_path
from .builtin import Classification, Multilabel, Regression, Segmentation
from .task import Task

_WITH_CLASSES = {
    TaskName.classification: Classification,
    TaskName.multilabel: Multilabel,
    TaskName.segmentation: Segmentation,
}


@dataclass(frozen=True)
class Objective:
    """The loss and the metrics of ``task``, with what finds its values in a network's output."""

    task: Task = field(default_factory=Classification)
    outputs: OutputReader = PLAIN_READER

    @classmethod
    def of(cls, config: Config) -> "Objective":
        """Returns what the options describe; raises ``ConfigError`` if the target is no task."""
        return cls(make(config.task), OutputReader(config.model.output))

    def read(self, output: Any) -> Any:
        """Returns what the task gets: the scores; for a user's task by default all."""
        is_own = not type(self.task).__module__.startswith(f"{__package__}.")
        if is_own and self.outputs.name is None:
            return output
        return self.outputs.scores(output)

    def describe(self, output: Any) -> str:
        """Returns in words which outputs are used; empty if the network returns just scores."""
        return "" if self.read(output) is output else self.outputs.describe(output)

    def wrong_sizes(self, output: Any, targets: Tensor) -> str:
        """Returns in words what is wrong with losses and sums of N samples; empty if all is right.

        The user's task may raise anything.
        """
        samples = len(targets)
        try:
            losses = self.losses(output, targets)
            sums = self.task.sums(self.read(output), targets)
            self.metrics(sums.double().sum(0), samples)
            is_right = losses.shape == (samples,) and sums.dim() == 2 and len(sums) == samples
            return "" if is_right else f"these are {tuple(losses.shape)} and {tuple(sums.shape)}"
        except (Exception, SystemExit) as error:
            return f"it raised {one_line(error)}"

    def losses(self, output: Any, targets: Tensor) -> Tensor:
        """Returns the loss of each sample, (N,), with those of auxiliary outputs."""
        read = self.read(output)
        total = self.task.losses(read, targets)
        if isinstance(read, Tensor):
            for values, weight in self.outputs.auxiliary_values(output):
                total = total + weight * self.task.losses(values, targets)
        return total

    def metrics(self, sums: Tensor, samples: float) -> dict[str, Any]:
        """Returns the task's metrics, each a float or a list of them, with NaN for None.

        Raises ``ValueError`` for other values, and for names that records use otherwise.
        """
        found = {name: _plain(v) for name, v in self.task.metrics(sums, samples).items()}
        wrong = [name for name, value in found.items() if value is None]
        if wrong:
            raise ValueError(f"the metric {wrong[0]} is not a number or a list of numbers")
        if "loss" in found:
            raise ValueError("the metric loss has the name of the mean loss: give it another")
        if isinstance(found.get("accuracy"), list):
            raise ValueError("the metric accuracy is a list: give it another name")
        return found

    def mean_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Returns the mean loss of ``model`` on inputs of N samples and their targets, 0-d."""
        return self.losses(applied(model, inputs), targets).mean()


def _plain(value: Any) -> Any:
    """Returns a metric as a float or a list of floats; None if it is neither."""
    if isinstance(value, list | tuple):
        values = [_number(each) for each in value]
        return None if None in values else values
    value = value.tolist() if hasattr(value, "tolist") else value
    return _plain(value) if isinstance(value, list) else _number(value)


def _number(value: Any) -> float | None:
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        return math.nan
    return float(value) if isinstance(value, int | float) else None


def make(config: TaskConfig) -> Task:
    """Makes the task; raises ``ConfigError`` if the user's cannot be imported or called."""
    if config.name is TaskName.regression:
        return Regression()
    if config.name is not TaskName.import_:
        weights = None if config.class_weights is None else tuple(config.class_weights)
        task = _WITH_CLASSES[config.name]
        return task(weights, config.label_smoothing, config.ignore_index)
    make_own = import_path.resolve("task.target", config.target or "", "a task")
    try:
        own = make_own(**config.options)
    except (Exception, SystemExit) as error:
        allowed = f"a class or function that takes task.options={config.options}"
        raise _error(config, allowed, f"it raised {one_line(error)}") from error
    if not isinstance(own, Task):
        allowed = "a callable that returns a fedtan_hpc.Task"
        raise _error(config, allowed, f"it returned a {type(own).__name__}")
    return own


def _error(config: TaskConfig, allowed: str, remedy: str) -> ConfigError:
    return ConfigError(format_option_error("task.target", config.target, allowed, remedy))
