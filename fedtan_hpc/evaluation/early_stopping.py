"""Which evaluation is the best, and whether the run ends early.

Both follow from the records alone: all ranks decide alike, and a run that was interrupted ends
after the same round.  Used by ``best_model`` and ``job``.  Loads without torch.
"""

from collections.abc import Iterable
from contextlib import suppress

from ..config.enums import StoppingMode
from ..config.errors import ConfigError, format_option_error
from ..config.schema import EarlyStoppingConfig
from .records import RoundRecord

SMALLER_IS_BETTER = ("loss", "error", "mae", "mse")
"""Words in the names of such metrics."""


class BestEvaluation:
    """The best of the evaluations that it was told of, and how many came after it.

    The metric is that of the option; without one the accuracy, or the loss if there is none.
    ``records`` are those of the rounds before.
    """

    def __init__(self, options: EarlyStoppingConfig, records: Iterable[RoundRecord] = ()) -> None:
        self._options = options
        self._name = options.metric or ""
        """Name of the metric; empty before the first evaluation if it depends on the task."""
        self.round = 0
        """Round of the best evaluation; 0 before the first."""
        self.value: float | None = None
        self._evaluations_since = 0
        self._is_evaluated = False
        """Whether the last round was evaluated: only then a run may end."""
        for record in records:
            with suppress(ConfigError):  # rounds before a change of options may lack the metric
                self.add(record)

    def add(self, record: RoundRecord) -> bool:
        """Takes the record of the next round; returns whether it is the best until now.

        Raises ``ConfigError``, on all ranks, if an evaluation lacks the metric of the option.
        """
        self._is_evaluated = record.test_loss is not None
        if not self._is_evaluated:
            return False
        if not self._name:
            self._name = "test_loss" if record.test_accuracy is None else "test_accuracy"
        self._evaluations_since += 1
        value = record.metrics.get(self._name, getattr(record, self._name, None))
        is_known = self._name in record.metrics or self.value is not None
        if value is None and is_known:  # it is not finite this time
            return False
        if not isinstance(value, int | float):
            raise _no_metric(self._name, record)
        is_best = self.value is None or self._is_better(value, self.value)
        if is_best:
            self.round, self.value, self._evaluations_since = record.round, float(value), 0
        return is_best

    def reason_to_stop(self) -> str:
        """Returns in words why the run ends here; empty if it goes on."""
        name, target, patience = self._name, self._options.target, self._options.patience
        if self.value is None or not self._is_evaluated:
            return ""
        if target is not None and not self._is_better(target, self.value):
            return f"{name} {self.value:.6g} in round {self.round} reached {target:g}"
        if patience is not None and self._evaluations_since >= patience:
            since = f"{self._evaluations_since} evaluations after round {self.round}"
            return f"{name} was not better than {self.value:.6g} in {since}"
        return ""

    def _is_better(self, value: float, than: float) -> bool:
        smaller = self._options.mode is StoppingMode.min
        if self._options.mode is StoppingMode.auto:
            smaller = any(word in self._name for word in SMALLER_IS_BETTER)
        return value < than if smaller else value > than


def _no_metric(name: str, record: RoundRecord) -> ConfigError:
    line = record.line()
    known = [key for key in line if key.startswith("test_") or key == "pooled_train_loss"]
    numbers = [key for key in known if isinstance(line[key], int | float)]
    remedy = "the task has no such metric that is one number"
    message = format_option_error("early_stopping.metric", name, " | ".join(numbers), remedy)
    error = ConfigError(message)
    error.on_all_ranks = True
    return error
