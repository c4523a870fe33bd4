"""The house: which room may import which, and what every file says of itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fedtan_hpc"

ENTRIES = ("compare", "evaluate", "overview", "runs", "show_partition", "submit", "summarise_runs")
"""Commands that an installed package offers beside the job: ``python -m fedtan_hpc.ENTRY``."""
LAYERS = [
    ENTRIES,
    ("reporting",),
    ("launch",),
    ("__main__",),
    ("cli", "__init__"),
    ("command_line",),
    ("inference",),
    ("job",),
    ("probing",),
    ("evaluation",),
    ("training",),
    ("tasks",),
    ("models",),
    ("batchnorm",),
    ("data",),
    ("distributed",),
    ("runtime",),
    ("files",),
    ("config",),
]
"""Rooms and top-level modules, from the top down: each imports only from layers below its own."""
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
TORCH_FREE = [
    "cli",
    "__main__",
    "__init__",
    *ENTRIES,
    "command_line",
    "config",
    "launch/requeue",
    "launch/submit",
    "reporting/options",
    "runtime/launcher_env",
    "runtime/signals",
    "runtime/malloc",
    "distributed/rendezvous",
    "distributed/channel",
    "distributed/counters",
]
"""Files and rooms that load without torch, so that options are checked within a second."""
FILES = sorted(PACKAGE.rglob("*.py"))
CODE = [path for name in ("fedtan_hpc", "tools", "slurm") for path in (ROOT / name).rglob("*.py")]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MOST_FILES = 13
"""In a room."""


def name_of(path: Path) -> str:
    """Path of a file below the package without its ending, such as job/run."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def room_of(path: Path) -> str:
    """Room of a file, or the file itself at the top."""
    return name_of(path).split("/")[0]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path: Path, lazily: bool = True) -> frozenset[str]:
    """Absolute dotted names that ``path`` imports: of modules, or of what is in them."""
    return frozenset(_imported(tree(path), path.relative_to(ROOT).parent.parts, lazily))


def _imported(node: ast.AST, package: tuple[str, ...], lazily: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = package[: len(package) - child.level + 1] if child.level else ()
            parts = (*base, *(child.module.split(".") if child.module else ()))
            yield from (".".join((*parts, alias.name)) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        elif lazily or not isinstance(child, ast.FunctionDef):
            yield from _imported(child, package, lazily)


def file_of(dotted: str) -> Path | None:
    """The file of the package that ``dotted``, a module or a name in one, refers to."""
    path = ROOT.joinpath(*dotted.split("."))
    for candidate in (path, path.parent):
        if candidate.with_suffix(".py") in FILES:
            return candidate.with_suffix(".py")
        if candidate / "__init__.py" in FILES:
            return candidate / "__init__.py"
    return None


def used(path: Path) -> set[Path]:
    """Files of the package that ``path`` imports anywhere, lazily too."""
    found = {file_of(name) for name in imported(path) if name.startswith("fedtan_hpc")}
    return {file for file in found if file is not None and file != path}


def test_every_file_has_a_layer() -> None:
    assert {name_of(path).split("/")[0] for path in FILES} == set(LAYER_OF)


def test_imports_go_down_only() -> None:
    upwards = [
        f"{name_of(path)} imports {name_of(file)}"
        for path in FILES
        for file in used(path)
        if room_of(file) != room_of(path)
        and LAYER_OF[room_of(file)] <= LAYER_OF[room_of(path)]
        and name_of(file) != "__init__"  # anybody may ask the package for its version
    ]
    assert not upwards


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_have_no_cycle(room: str) -> None:
    inside = [path for path in FILES if room_of(path) == room]
    graph = {name_of(p): {name_of(other) for other in used(p) if other in inside} for p in inside}
    assert list(TopologicalSorter(graph).static_order())


def test_one_room_alone_uses_torch_distributed() -> None:
    users = {
        room_of(path)
        for path in FILES
        if any(name.startswith("torch.distributed") for name in imported(path))
    }
    assert users == {"distributed"}


@pytest.mark.parametrize("name", TORCH_FREE)
def test_options_are_checked_without_torch(name: str) -> None:
    """No file on the way imports a large library when it is loaded."""
    ahead = [path for path in FILES if name in (name_of(path), room_of(path))]
    seen: set[Path] = set()
    while ahead:
        path = ahead.pop()
        seen.add(path)
        now = imported(path, lazily=False)
        heavy = {"torch", "numpy", "sklearn", "matplotlib", "tensorboard", "submitit"}
        heavy |= {"wandb", "mlflow"}
        assert not {each.split(".")[0] for each in now} & heavy, path
        files = {file_of(each) for each in now if each.startswith("fedtan_hpc")}
        ahead += [file for file in files if file is not None and file not in seen]
    assert seen


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_say_what_they_are_for_and_run_nothing(room: str) -> None:
    path = PACKAGE / room / "__init__.py"
    [statement] = ast.parse(path.read_text(encoding="utf-8")).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)
    assert len(list(path.parent.glob("*.py"))) <= MOST_FILES


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_say_which_rooms_they_use_and_which_use_them(room: str) -> None:
    """Those that a room's docstring names are used; no user is left out where any is named."""
    text = " ".join((ast.get_docstring(tree(PACKAGE / room / "__init__.py")) or "").split())
    below = {room_of(file) for path in FILES if room_of(path) == room for file in used(path)}
    above = {room_of(path) for path in FILES if room in map(room_of, used(path))}
    named_below, named_above = (
        set(re.findall(r"``(\w+)``", " ".join(re.findall(rf"{words} ([^.;]*)", text))))
        for words in ("Uses", "[Uu]sed by")
    )
    assert named_below <= below - {room}
    assert named_above in (set(), above & set(ROOMS) - {room})


def test_files_say_what_they_are_for() -> None:
    assert not [path for path in CODE if not ast.get_docstring(tree(path))]


def test_files_are_short() -> None:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in (*CODE, *TESTS)}
    assert not {p: n for p, n in lines.items() if n > (400 if p in TESTS else 300)}


def test_functions_are_short_and_take_few_parameters() -> None:
    """Those that torch calls take what torch gives them."""
    by_torch = ("forward", "backward", "vmap", "setup_context")
    for path in CODE:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                where = f"{path}:{node.lineno} {node.name}"
                assert (node.end_lineno or 0) - node.lineno < 60, where
                names = {each.arg for each in (*node.args.args, *node.args.kwonlyargs)}
                assert len(names - {"self", "cls", "ctx"}) <= 6 or node.name in by_torch, where


def test_tests_leave_the_path_alone() -> None:
    # What runs a program in a forked process does for it what an interpreter's start does.
    exempt = ("commands.py", "test_house.py")
    patched = [p for p in TESTS if "sys.path" in p.read_text(encoding="utf-8")]
    assert not [path for path in patched if path.name not in exempt]
