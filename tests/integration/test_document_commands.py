"""The commands of the documents: their options are valid, and those of ``sh`` blocks run.

``bash`` blocks have commands that need more than this machine.  ``test_slurm`` runs some of them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest

from fedtan_hpc import cli
from fedtan_hpc.config.errors import ConfigError, check_together
from fedtan_hpc.config.submit_options import SubmitConfig, check_launch
from fedtan_hpc.config.validate import check
from fedtan_hpc.config.validation import tracking
from fedtan_hpc.reporting import options
from fedtan_hpc.reporting.comparison import members
from tests.helpers import commands, documents
from tests.helpers.documents import PAGES, Block, blocks, read
from tests.helpers.ranks import MPI_VARIABLES

JOB = ("fedtan_hpc", "slurm/train.sbatch")
SUBMISSION = ("fedtan_hpc.submit", "slurm/submit.py")
COMPARISON = ("fedtan_hpc.compare", "tools/compare.py")
PARTITION = ("fedtan_hpc.show_partition", "tools/show_partition.py")
STUDIES = tuple(
    f"tools/{name}.py"
    for name in (
        "bench_allreduce",
        "bench_checkpoint",
        "bench_memory",
        "bench_round",
        "fit_network",
        "predict_scaling",
        "probe",
        "scaling_study",
        "validate_prediction",
    )
)
"""Programs that take options of a job beside those of their own."""
SYNTHETIC = tuple(
    f"tools/{name}.py"
    for name in ("bench_memory", "bench_round", "predict_scaling", "validate_prediction")
)
"""Those whose job has synthetic data by default."""
PROGRAMS = (*JOB, *SUBMISSION, *COMPARISON, *PARTITION, *STUDIES)
SHORT: Mapping[tuple[str, ...], tuple[str, ...]] = {
    (*JOB, *SUBMISSION, *COMPARISON): ("rounds=1", "local_steps=1"),
    ("tools/scaling_study.py",): ("rounds=1", "local_steps=1", "repeats=1"),
    ("tools/bench_cohort.py",): (
        *("--clients", "2", "--repeats", "1"),
        *("--batch-size", "2", "--local-steps", "2"),
    ),
}
"""Words that make a command of a page short."""
SECONDS = 200
"""For one command; the tests' machine may be busy."""


BY_LENGTH = [
    pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.stem == "results" else ())
    for page in PAGES
]
"""The page of results has a hundred runs."""


def calls(page: Path, *languages: str) -> Iterator[tuple[str, list[str]]]:
    """Programs that take options, and the words behind them, in the blocks of a page."""
    for block in blocks(read(page), *languages):
        for line in documents.lines_of(block):
            if any(program in line for program in PROGRAMS):
                command, _, _ = documents.split_at_operator(few_seeds(line))
                yield from called(shlex.split(command))


def called(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The program that the words call, and its own words without variables of the shell."""
    for number, word in enumerate(words):
        if word.removeprefix("./") in PROGRAMS and (words[number - 1] == "-m" or "/" in word):
            yield word, [each for each in words[number + 1 :] if "$" not in each]
            return


def check_options(program: str, words: list[str]) -> None:
    """Raises ``ConfigError`` for options that do not exist, or have wrong values."""
    if {"--help", "--version", "--script"} & set(words):
        return
    if program in COMPARISON:
        one_seed = [word for word in words if not word.startswith("seeds=")]
        members.plan([*one_seed, "seeds=[0]"])
    elif program in SUBMISSION:
        configs = cli.compose_as(SubmitConfig, "submit", words)
        check_together(partial(check, each.job()) for each in configs)
        check_together(
            partial(check_launch, each.launch, each.ranks_per_client) for each in configs
        )
    else:
        names = {"tools/show_partition.py": ("out",), PARTITION[0]: ("out",)}.get(program, ())
        if program in STUDIES:
            names = importlib.import_module(Path(program).stem).OPTIONS
        _, job = options.split(words, names)
        job = ["data=synthetic", *job] if program in SYNTHETIC else job
        job = [word for word in job if program != "tools/scaling_study.py" or "launch." not in word]
        check_together(partial(check, each) for each in cli.compose(job))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", BY_LENGTH)
def test_options_of_commands_are_valid(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "_PACKAGES", {})  # of trackers, which this machine may lack
    for program, words in calls(page, "sh", "bash", ""):
        try:
            check_options(program, words)
        except ConfigError as error:
            pytest.fail(f"{program} {shlex.join(words)}\n{error}")


def test_wrong_options_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = """```sh
        torchrun --nproc-per-node 2 -m fedtan_hpc rounds=0 | tail -1
        sbatch --nodes=2 slurm/train.sbatch \\
            run_dir=$OUT nodes=3
        python slurm/submit.py launch.node=2  # two nodes
        python tools/compare.py 'methods=[fedtan,fedavgg]'
        python tools/bench_round.py repeats=3 rounds=0
        python tools/show_partition.py out=a.png clients=0
        python -m fedtan_hpc -m seed=0,1 \"rounds=${ROUNDS}\"
        cat fedtan_hpc/cli.py
        """
    text = f"{re.sub('^        ', '', text, flags=re.MULTILINE)}```\n"
    (tmp_path / "page.md").write_text(text)
    found = list(calls(tmp_path / "page.md", "sh"))
    assert len(found) == 7
    assert found[1] == ("slurm/train.sbatch", ["nodes=3"])
    for program, words in found[:-1]:
        with pytest.raises(ConfigError):
            check_options(program, words)
    check_options(*found[-1])


def few_seeds(line: str) -> str:
    return re.sub(r"\b(seeds?=\[?\d+,\d+)[\d,]*", r"\1", line)


def shortened(line: str) -> str:
    """The command with two seeds at most and a single short round."""
    command, operator, rest = documents.split_at_operator(few_seeds(line))
    words = set(shlex.split(command))
    added = [word for programs, more in SHORT.items() if words & set(programs) for word in more]
    if "synchronised_steps=" in line or "local_epochs=" in line:  # these decide
        added = [word for word in added if word != "local_steps=1"]
    if "layers=auto" in line and "probe_run=" not in line:  # the choice comes after three rounds
        added = [word.replace("rounds=1", "rounds=4") for word in added]
    if "probe.every=" in line:
        added.append("probe.every=4" if "rounds=4" in added else "probe.every=1")
        if words & set(COMPARISON) and "seeds=" not in line:
            added += ["seeds=[0]", "data.train_samples=2000", "data.test_samples=200"]
    return " ".join([command, *added, operator, rest]).strip()


def expanded(word: str, folder: Path) -> list[str]:
    """What a shell in ``folder`` makes of a pattern."""
    if "*" not in word:
        return [word]
    return [str(path.relative_to(folder)) for path in sorted(folder.glob(word))]


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in a shell, or where it needs none, in processes that have loaded torch."""
    _, operator, _ = documents.split_at_operator(line)
    if re.match(r"(python|torchrun --nproc-per-node) ", line) and not operator and "$" not in line:
        words = [part for word in shlex.split(line) for part in expanded(word, folder)]
        return commands.forked(*words, cwd=folder, seconds=SECONDS)
    programs = Path(sys.executable).parent
    return subprocess.run(
        ["bash", "-ec", line],
        cwd=folder,
        env={
            **os.environ,
            **MPI_VARIABLES,
            "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(commands.ROOT), str(folder)]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python -m fedtan_hpc -m seed=0,1,2", "python -m fedtan_hpc -m seed=0,1 {}"),
        ("python -m fedtan_hpc a=1 | tail -1", "python -m fedtan_hpc a=1 {} | tail -1"),
        ("python tools/compare.py 'seeds=[0,1,2,3]'", "python tools/compare.py 'seeds=[0,1]' {}"),
        ("mpirun -n 2 python -m fedtan_hpc  # so", "mpirun -n 2 python -m fedtan_hpc {}"),
        ("python -m fedtan_hpc.runs runs > a", "python -m fedtan_hpc.runs runs > a"),
        (
            "python -m fedtan_hpc a.synchronised_steps=2",
            "python -m fedtan_hpc a.synchronised_steps=2 rounds=1",
        ),
    ],
)
def test_commands_are_shortened(line: str, expected: str) -> None:
    assert shortened(line) == expected.format("rounds=1 local_steps=1")


def to_run(page: Path) -> list[Block]:
    """Commands and programs of a page; not the quick start, which makes an environment."""
    text = re.sub(r"^## Quick start\n.*?(?=^## )", "", read(page), flags=re.DOTALL | re.MULTILINE)
    return blocks(text, "sh", "python")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(read(page), "sh")], ids=lambda path: path.stem
)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    """All of a page in its order in one folder, where later ones see earlier files."""
    for name in ("tools", "slurm", "conf"):
        (tmp_path / name).symlink_to(commands.ROOT / name)
    (tmp_path / "docs").mkdir()
    run_blocks(to_run(page), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("page", "title", "package", "extra", "programs"),
    [
        ("own_data", "A data set of Hugging Face", "datasets", "huggingface", 2),
        ("own_task", "Fine-tune a network of timm", "timm", "networks", 1),
    ],
)
def test_an_example_that_needs_one_more_package_runs(
    page: str, title: str, package: str, extra: str, programs: int, tmp_path: Path
) -> None:
    """Its commands are bash, because the tests' machine may lack the package."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install -e '.[{extra}]'")
    _, text = read(commands.ROOT / "docs" / f"{page}.md").split(f"\n## {title}\n")
    found = blocks(text.split("\n## ")[0], "python", "bash")
    assert [block.language for block in found] == [*["python"] * programs, "bash"]
    run_blocks(found, tmp_path)


def run_blocks(found: list[Block], folder: Path) -> None:
    """Writes programs to files, and runs commands."""
    for block in found:
        if block.language == "python":
            if (file := documents.program(block)) is not None:
                (folder / file).write_text(block.text, encoding="utf-8")
            continue
        for line in documents.lines_of(block):
            done = run(shortened(line), folder)
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr}"
            losses = re.findall(r"^training loss (\d\.\d+)$", done.stdout, flags=re.MULTILINE)
            assert all(float(loss) < 0.6 for loss in losses), line
