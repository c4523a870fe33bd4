"""Mistakes in the options of the task.  Used by ``validate``."""

from collections.abc import Iterator

from ..enums import PartitionName, ShiftName, TaskName
from ..errors import format_option_error
from ..schema import Config, TaskConfig
from .training import own_code_mistakes

_WITHOUT_CLASSES = (TaskName.regression, TaskName.import_)
_WITH_IGNORED = (TaskName.segmentation, TaskName.multilabel)
_BY_CLASS = (PartitionName.shards, PartitionName.dirichlet)

METRICS = {
    TaskName.classification: ("accuracy", "recall"),
    TaskName.multilabel: ("f1", "f1_micro"),
    TaskName.segmentation: ("iou", "dice", "pixel_accuracy"),
    TaskName.regression: ("mae", "r2"),
}
"""Metrics of the built-in tasks that are numbers; rounds.jsonl has them as test_NAME."""


def task_mistakes(config: Config) -> Iterator[str]:
    """Yields one line for each mistake."""
    task = config.task
    is_import, example = task.name is TaskName.import_, "my_tasks:Ranking"
    yield from own_code_mistakes("task", is_import, task.target, task.options, example)
    yield from _classes(task)
    yield from _data(config)


def _classes(task: TaskConfig) -> Iterator[str]:
    weights, smoothing, ignored = task.class_weights, task.label_smoothing, task.ignore_index
    has_classes = task.name not in _WITHOUT_CLASSES
    if weights is not None and not has_classes:
        allowed = f"null with task={task.name}"
        yield format_option_error("task.class_weights", weights, allowed, "leave it out")
    elif weights == []:
        allowed, remedy = "a number >= 0 for each class", "try task.class_weights=[1,2]"
        yield format_option_error("task.class_weights", weights, allowed, remedy)
    if smoothing and not has_classes:
        allowed = f"0 with task={task.name}"
        yield format_option_error("task.label_smoothing", smoothing, allowed, "leave it out")
    if ignored is not None and task.name not in _WITH_IGNORED:
        allowed = f"null with task={task.name}"
        remedy = "leave it out, and such samples out of the data"
        yield format_option_error("task.ignore_index", ignored, allowed, remedy)


def _data(config: Config) -> Iterator[str]:
    """Checks that the data and their partition have what the task needs."""
    task, partition = config.task.name, config.partition
    if task in (TaskName.classification, TaskName.import_):
        return
    if not config.data.is_own:
        allowed = f"classification or import with data={config.data.name}"
        remedy = "use data=import for data with other targets"
        yield format_option_error("task.name", task, allowed, remedy)
    elif partition.name in _BY_CLASS:
        allowed = f"iid, quantity, natural or feature_shift with task={task}"
        remedy = "use partition=natural for the clients of your data, or partition=iid"
        yield format_option_error("partition.name", partition.name, allowed, remedy)
    is_rotated = partition.name is PartitionName.feature_shift
    if is_rotated and task is TaskName.segmentation and partition.shift is not ShiftName.intensity:
        allowed = "intensity with task=segmentation, because masks do not rotate"
        remedy = "set partition.shift=intensity"
        yield format_option_error("partition.shift", partition.shift or "null", allowed, remedy)
