"""The interface of tasks.  The built-in ones are in ``builtin``; ``objective`` makes them.

Shapes: N samples, S sums.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Task:
    """A loss for each sample, and metrics that follow from sums over all samples.

    Derive a task of your own from it, for ``task=import``.  A rank calls ``losses`` in training,
    also for several clients at once under ``torch.func.vmap``; so it must not branch on values.
    ``output`` is what the network returns, or its element ``model.output``.
    """

    def losses(self, output: Any, targets: Tensor) -> Tensor:
        """Returns the loss of each sample, (N,), for ``targets`` of N samples."""
        raise NotImplementedError

    def sums(self, output: Any, targets: Tensor) -> Tensor:
        """Returns values of each sample, (N, S); the job adds them up over samples and ranks."""
        return targets.new_zeros(len(targets), 0)

    def metrics(self, sums: Tensor, samples: float) -> Mapping[str, Any]:
        """Returns the metrics by name, numbers or lists of one for each class.

        Args:
            sums: the values of ``sums`` added up over all samples, (S,) in float64.
            samples: the number of samples; for weighted samples the sum of their weights.

        A value that is None or not finite, as for a class without samples, is recorded as null.
        The first number is the one that progress, result and comparisons show.  No metric is named
        loss, which records have already; accuracy is a share, 0 to 1.
        """
        return {}

    def mistake(self, output: Any, targets: Tensor, classes: int) -> str:
        """Returns the shape that ``output`` for the ``targets`` of N samples should have, in words.

        Returns an empty string if it has that.  The job asks before it trains.
        """
        return ""
