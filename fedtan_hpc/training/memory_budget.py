"""How many clients fit in a rank's memory together, known before they run.

Used by ``client_runners`` around each round, and by ``client_state`` for what stays on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.errors import RunError
from ..config.schema import Config
from ..data.batching import Samples
from ..distributed import process_group
from ..distributed.model_average import model_tensors
from ..models.outputs import PLAIN_READER, OutputReader

_PEAK_FACTOR = 1.6
"""Peak memory of a pass over what it saves; measured for stacked ResNet-20 on a CPU."""


class MemoryBudget:
    """Memory of the clients that a rank runs together; ``dummy`` is a single sample."""

    def __init__(
        self, model: nn.Module, dummy: Samples, config: Config, ranks_per_device: int
    ) -> None:
        self._device = dummy.inputs.device
        self._ranks_per_device = ranks_per_device
        self._largest = 0
        """Bytes of the largest round until now."""
        values = sum(value.nbytes for value in model_tensors(model))
        self.model_bytes = values * (3 if config.optimizer.momentum else 2)
        """Parameters, gradients and momentum of one client."""
        saved = config.batch_size * saved_bytes_per_sample(
            model, dummy, OutputReader(config.model.output)
        )
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
            if not _is_out_of_memory(error):
                raise
            raise self._error(passes, needed, free or 0, round_number) from error
        self._largest = max(self._largest, needed)

    def leaves_room_for(self, more: int) -> bool:
        """Whether ``more`` bytes can stay on the device during a round like the largest one."""
        free = free_bytes(self._device, self._ranks_per_device)
        return free is None or free - self._largest >= more

    def _error(self, passes: int, needed: int, free: int, round_number: int) -> RunError:
        fit = max(1, int(free // (self.model_bytes + self.pass_bytes)))
        fit = min(fit, max(passes - 1, 1))
        return RunError(
            f"rank {process_group.rank()}, round {round_number}: {passes} clients at once need "
            f"{needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: {fit} would fit; "
            "use more ranks, a smaller batch_size or clients_per_round",
            on_all_ranks=False,
        )


def _is_out_of_memory(error: BaseException) -> bool:
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or "can't allocate memory" in str(error)


def saved_bytes_per_sample(
    model: nn.Module, sample: Samples, outputs: OutputReader = PLAIN_READER
) -> int:
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
    inputs, labels = (torch.cat([value, value]) for value in (sample.inputs, sample.labels))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda value: value):
        outputs.mean_loss(model, inputs, labels)
    model.train(was_training)
    return sum(sizes.values()) // len(labels)


def free_bytes(device: torch.device, ranks_per_device: int) -> int | None:
    """Returns this rank's share of the device's free memory; None if the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) // ranks_per_device + cached
    candidates = _left_in_cgroups(Path("/"))
    if kib := _numbers(Path("/proc/meminfo")).get("MemAvailable:"):
        candidates.append(1024 * kib)
    return min(candidates) // ranks_per_device if candidates else None


def _left_in_cgroups(root: Path) -> list[int]:
    """Returns the bytes left by the limits of this process's control groups (batch systems)."""
    groups = root / "proc/self/cgroup"
    if not groups.exists():
        return []
    left = []
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers == "memory":  # version 1
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            left += _left(mount / "memory", path, *names)
        elif controllers == "":  # version 2
            left += _left(mount, path, "memory.max", "memory.current")
    return left


def _left(mount: Path, path: str, limit_name: str, used_name: str) -> list[int]:
    """Returns limit minus use, file cache not counted; in a container the group is the mount."""
    for folder in (mount / path.lstrip("/"), mount):
        limit, used = folder / limit_name, folder / used_name
        if limit.exists() and used.exists():
            if limit.read_text().strip() == "max":
                return []
            cache = _numbers(folder / "memory.stat").get("inactive_file", 0)
            return [max(0, int(limit.read_text()) - int(used.read_text()) + cache)]
    return []


def _numbers(path: Path) -> dict[str, int]:
    """Returns the first number of each line by the word before it."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {words[0]: int(words[1]) for words in map(str.split, lines)}
