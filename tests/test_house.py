"""The house: who may import whom, and what every module says of itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedtan_hpc"

# A module imports only from modules above it.
ROOMS = [
    "errors",
    "limits",
    "choices",
    "config",
    "launch",
    "environment",
    "signals",
    "slurm",
    "channel",
    "traffic",
    "algorithms",
    "check_data",
    "check_methods",
    "check_model",
    "checks",
    "explain",
    "manual",
    "allocator",
    "device",
    "transfer",
    "mpi_library",
    "mpi_buffers",
    "mpi_group",
    "mpi",
    "stopwatch",
    "comm",
    "watchdog",
    "files",
    "checkpoint",
    "halves",
    "messages",
    "lockstep",
    "own_batch",
    "federation",
    "moments",
    "shared_batch",
    "normalise",
    "operator",
    "batchnorm",
    "reference",
    "running",
    "average",
    "agreement",
    "parts",
    "vision",
    "target",
    "zoo",
    "resnet",
    "models",
    "norms",
    "streams",
    "partition",
    "participation",
    "image_files",
    "fetch",
    "augment",
    "shift",
    "data",
    "clients",
    "loss",
    "sgd",
    "local_training",
    "compilation",
    "private",
    "pooled_gradients",
    "memory",
    "apart",
    "stacked",
    "trial",
    "server",
    "cohort",
    "evaluate",
    "judge",
    "metrics",
    "display",
    "run_folder",
    "keeper",
    "resume",
    "trainer",
    "prepare",
    "phases",
    "outcome",
    "job",
    "cli",
    "requeue",
    "submission",
]
WITHOUT_TORCH = ROOMS[: ROOMS.index("device")]
FILES = sorted(PACKAGE.glob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules of the package and others that ``path`` imports anywhere, lazily too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
        elif isinstance(node, ast.ImportFrom):
            found |= {f".{node.module}"} if node.module else {f".{a.name}" for a in node.names}
    return found


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in FILES} == {*ROOMS, "__init__", "__main__"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_upwards_only(room: str) -> None:
    used = {name[1:] for name in imports(PACKAGE / f"{room}.py") if name.startswith(".")}
    assert used - {"__version__"} <= set(ROOMS[: ROOMS.index(room)])


@pytest.mark.parametrize(
    "room", [room for room in ROOMS if room != "comm" and not room.startswith("mpi")]
)
def test_comm_and_mpi_alone_use_torch_distributed(room: str) -> None:
    assert not any(name.startswith("torch.distributed") for name in imports(PACKAGE / f"{room}.py"))
    assert "dist." not in (PACKAGE / f"{room}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_checks_do_without_torch(room: str) -> None:
    heavy = ("torch", "numpy", "sklearn")
    assert not any(name.split(".")[0] in heavy for name in imports(PACKAGE / f"{room}.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_modules_are_short_and_say_what_they_are_for(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)) or path.stem == "__main__"
    assert source.count("\n") <= 300
