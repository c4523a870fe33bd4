"""How many clients fit in a rank's memory together, known before they run.

Used by ``client_runners`` around each round, and by ``client_state`` for what stays on a GPU.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..config.errors import RunError, one_line
from ..config.schema import Config
from ..data.batching import Samples
from ..distributed import process_group
from ..distributed.model_average import model_tensors
from ..runtime.free_memory import free_bytes
from ..tasks.objective import Objective
from .optimizers import state_tensors

_PEAK_FACTOR = 1.6
"""Peak memory of a pass over what it saves; measured for stacked ResNet-20 on a CPU."""


class MemoryBudget:
    """Memory of the clients that a rank runs together; ``dummy`` is a single sample."""

    def __init__(
        self,
        model: nn.Module,
        dummy: Samples,
        config: Config,
        ranks_per_device: int,
        objective: Objective,
    ) -> None:
        self._device = dummy.device
        self._ranks_per_device = ranks_per_device
        self._largest = 0
        """Bytes of the largest round until now."""
        values = sum(value.nbytes for value in model_tensors(model))
        self.model_bytes = values * (2 + state_tensors(config.optimizer))
        """Parameters, gradients and optimizer state of one client."""
        samples = -(-config.batch_size // config.ranks_per_client)
        saved = samples * saved_bytes_per_sample(model, dummy, objective)
        self.pass_bytes = int(_PEAK_FACTOR * saved)
        """Activations of one client in a forward and backward pass of a whole batch."""

    @contextmanager
    def spent_on(self, models: int, passes: int, round_number: int) -> Iterator[None]:
        """Runs a round that has ``models`` clients in memory and ``passes`` of them in one pass.

        Raises ``RunError`` that says how many clients would fit, before or when memory runs out;
        one client may always try.
        """
        needed = models * self.model_bytes + passes * self.pass_bytes
        free = free_bytes(self._device, self._ranks_per_device)
        if free is not None and needed > free and needed > self._largest and passes > 1:
            raise self._error(passes, needed, free, round_number)
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if passes == 1 or not _may_be_of_clients(error, needed):
                raise
            reason = f" ({one_line(error)})"
            raise self._error(passes, needed, free or 0, round_number, reason) from error
        self._largest = max(self._largest, needed)

    def leaves_room_for(self, more: int) -> bool:
        """Whether ``more`` bytes can stay on the device during a round like the largest one."""
        free = free_bytes(self._device, self._ranks_per_device)
        return free is None or free - self._largest >= more

    def _error(
        self, passes: int, needed: int, free: int, round_number: int, reason: str = ""
    ) -> RunError:
        fit = max(1, int(free // (self.model_bytes + self.pass_bytes)))
        fit = min(fit, max(passes - 1, 1))
        return RunError(
            f"rank {process_group.rank()}, round {round_number}: {passes} clients at once need "
            f"{needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: {fit} would fit; "
            f"use more ranks, a smaller batch_size or clients_per_round{reason}",
            on_all_ranks=False,
        )


def _may_be_of_clients(error: BaseException, needed: int) -> bool:
    """Returns whether torch has refused memory that ``needed`` bytes of clients may have asked for.

    Clients are tensors: Python's and numpy's errors are of the user's code, as is a single tensor
    that is larger than all clients.
    """
    text = str(error)
    if isinstance(error, MemoryError):
        return "bad_alloc" in text
    asked = re.search(r"you tried to allocate (\d+) bytes", text)
    is_known = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text
    return is_known and (asked is None or int(asked[1]) <= needed)


def saved_bytes_per_sample(model: nn.Module, sample: Samples, objective: Objective) -> int:
    """Returns the bytes per sample that a forward pass saves for backward, without parameters."""
    parameters = {value.untyped_storage().data_ptr() for value in model.parameters()}
    sizes: dict[int, int] = {}
    saved: list[Tensor] = []  # kept alive, so that no two share an address

    def save(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
            saved.append(value)
        return value

    was_training = model.training
    model.eval()  # running statistics stay unchanged
    labels = torch.cat([sample.labels, sample.labels])
    two = sample.map_inputs(lambda value: torch.cat([value, value]), labels)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda value: value):
        objective.mean_loss(model, two.inputs, two.labels)
    model.train(was_training)
    return sum(sizes.values()) // len(two)
