"""How many clients fit in a rank's memory at once, before they are tried."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from . import comm
from .data import Samples
from .errors import RunError
from .local_training import loss_of

_PASSING = 1.6
"""What a pass takes in all over what it keeps: stacked ResNet-20 on a CPU, measured."""


class Budget:
    """Memory of the clients that a rank runs together: a model, its gradients, its activations."""

    def __init__(self, model: nn.Module, dummy: Samples, batch_size: int, ranks_here: int) -> None:
        self._device = dummy.inputs.device
        self._ranks_here = ranks_here
        self._checked = 1
        values = sum(value.nbytes for value in [*model.parameters(), *model.buffers()])
        kept = batch_size * saved_bytes_per_sample(model, dummy)
        self.bytes_per_client = int(2 * values + _PASSING * kept)
        """Parameters and gradients, and what the backward pass keeps of a whole batch."""

    def check(self, clients: int, round_number: int) -> None:
        """Raise ``RunError`` if ``clients`` at once would not fit; one always may try."""
        free = free_bytes(self._device, self._ranks_here)
        if clients <= self._checked or free is None:
            return
        fit = max(1, int(free // self.bytes_per_client))
        if clients > fit:
            needed = clients * self.bytes_per_client
            raise RunError(
                f"rank {comm.rank()}, round {round_number}: {clients} clients at once need "
                f"{needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: {fit} would fit; "
                "use more ranks, a smaller batch_size or clients_per_round",
                on_all_ranks=False,
            )
        self._checked = clients


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
    model.eval()  # statistics stay as they are
    pair = Samples(*(torch.cat([value, value]) for value in (sample.inputs, sample.labels)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss_of(model, pair)
    return sum(kept.values()) // len(pair)


def free_bytes(device: torch.device, ranks_here: int) -> int | None:
    """Memory that one of this machine's ranks may still take; None if it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + cached
    candidates = [*_available(Path("/proc/meminfo")), *_within_cgroup(Path("/sys/fs/cgroup"))]
    return min(candidates) // ranks_here if candidates else None


def _available(meminfo: Path) -> list[int]:
    if not meminfo.exists():
        return []
    lines = [line.split() for line in meminfo.read_text().splitlines()]
    return [1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"]


def _within_cgroup(folder: Path) -> list[int]:
    """What a limit of this process's control group leaves, as batch systems set it."""
    limit, used = folder / "memory.max", folder / "memory.current"
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return []
    return [int(limit.read_text()) - int(used.read_text())]
