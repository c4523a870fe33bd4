"""Free memory of a rank: of its GPU, or of the machine within the limits of a batch system.

Used by ``training.memory_budget``, by ``data.loading`` and, before work begins, by ``job.setup``.
"""

import resource
from pathlib import Path

import torch


def free_bytes(device: torch.device, ranks_per_device: int) -> int | None:
    """Returns this rank's share of the device's free memory; None if the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) // ranks_per_device + cached
    return host_bytes(ranks_per_device)


def host_bytes(ranks: int, root: Path = Path("/")) -> int | None:
    """Returns the host memory that is left to each of ``ranks`` on this node; None if not known.

    It is the least of the machine's available memory, of what control groups leave, and of what
    the limits of this process leave (``ulimit -v`` and ``ulimit -d``).
    """
    shared = _left_in_cgroups(root)
    if kib := _numbers(root / "proc/meminfo").get("MemAvailable:"):
        shared.append(1024 * kib)
    used = _numbers(root / "proc/self/status")
    limits = {"VmSize:": resource.RLIMIT_AS, "VmData:": resource.RLIMIT_DATA}
    left = [each // ranks for each in shared]
    for name, limit in limits.items():
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            left.append(max(0, most - 1024 * used.get(name, 0)))
    return min(left, default=None)


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
    rows = (line.split() for line in lines)
    return {words[0]: int(words[1]) for words in rows if len(words) > 1 and words[1].isdecimal()}
