"""How many clients fit in a rank's memory at once, before they are tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.errors import RunError
from ..data.batching import Samples
from ..distributed import process_group
from ..distributed.model_average import model_tensors
from .local_training import LocalTraining
from .loss import loss_of

_PASSING = 1.6
"""What a pass takes in all over what it keeps: stacked ResNet-20 on a CPU, measured."""


class MemoryBudget:
    """Memory of the clients that a rank runs together."""

    def __init__(
        self, model: nn.Module, dummy: Samples, training: LocalTraining, ranks_per_device: int
    ) -> None:
        self._device = dummy.inputs.device
        self._sharing = ranks_per_device
        self._checked = 0
        values = sum(value.nbytes for value in model_tensors(model))
        self.bytes_held = values * (3 if training.momentum else 2)
        """Of one client: parameters, gradients and momentum."""
        kept = training.batch_size * saved_bytes_per_sample(model, dummy)
        self.bytes_at_once = int(_PASSING * kept)
        """Of one client in a forward and backward pass of a whole batch."""

    @contextmanager
    def spent_on(self, held: int, at_once: int, round_number: int) -> Iterator[None]:
        """Run the clients of a round if they fit, ``at_once`` of ``held`` in a pass together.

        Raises ``RunError`` that says how many would fit, before or when memory runs out; one client
        always may try.
        """
        needed = held * self.bytes_held + at_once * self.bytes_at_once
        free = free_bytes(self._device, self._sharing)
        if free is not None and needed > free and needed > self._checked and at_once > 1:
            raise self._error(at_once, needed, free, round_number)
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise self._error(at_once, needed, free or 0, round_number) from error
        self._checked = max(self._checked, needed)

    def leaves_room_for(self, more: int) -> bool:
        """Whether so many bytes can stay on the device beside a round like those until now."""
        free = free_bytes(self._device, self._sharing)
        return free is None or free - self._checked >= more

    def _error(self, at_once: int, needed: int, free: int, round_number: int) -> RunError:
        fit = max(1, int(free // (self.bytes_held + self.bytes_at_once)))
        fit = min(fit, max(at_once - 1, 1))
        return RunError(
            f"rank {process_group.rank()}, round {round_number}: {at_once} clients at once need "
            f"{needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: {fit} would fit; "
            "use more ranks, a smaller batch_size or clients_per_round",
            on_all_ranks=False,
        )


def _is_out_of_memory(error: BaseException) -> bool:
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or "can't allocate memory" in str(error)


def saved_bytes_per_sample(model: nn.Module, sample: Samples) -> int:
    """What a forward pass keeps for the backward pass, for each sample, parameters apart."""
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(value)  # so that no two share an address
        return value

    alive: list[Tensor] = []
    was_training = model.training
    model.eval()  # statistics stay as they are
    pair = Samples(*(torch.cat([value, value]) for value in (sample.inputs, sample.labels)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss_of(model, pair)
    model.train(was_training)
    return sum(kept.values()) // len(pair)


def free_bytes(device: torch.device, ranks_per_device: int) -> int | None:
    """Memory that each of the ranks sharing the device's may take; None if it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) // ranks_per_device + cached
    candidates = [*_available(Path("/proc/meminfo")), *_within_cgroups(Path("/"))]
    return min(candidates) // ranks_per_device if candidates else None


def _available(meminfo: Path) -> list[int]:
    if not meminfo.exists():
        return []
    lines = [line.split() for line in meminfo.read_text().splitlines()]
    return [1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"]


def _within_cgroups(root: Path) -> list[int]:
    """What the limits of this process's control group leave, as batch systems set them."""
    groups = root / "proc/self/cgroup"
    if not groups.exists():
        return []
    found = []
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers == "memory":  # version 1
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            found += _left(mount / "memory", path, *names)
        elif controllers == "":  # version 2
            found += _left(mount, path, "memory.max", "memory.current")
    return found


def _left(mount: Path, path: str, limit_name: str, used_name: str) -> list[int]:
    """Limit less use, file cache apart; inside a container the group itself is the mount."""
    for folder in (mount / path.lstrip("/"), mount):
        limit, used = folder / limit_name, folder / used_name
        if limit.exists() and used.exists():
            if limit.read_text().strip() == "max":
                return []
            cache = _inactive_file(folder / "memory.stat")
            return [max(0, int(limit.read_text()) - int(used.read_text()) + cache)]
    return []


def _inactive_file(stat: Path) -> int:
    if not stat.exists():
        return 0
    lines = [line.split() for line in stat.read_text().splitlines()]
    return sum(int(words[1]) for words in lines if words[0] == "inactive_file")
