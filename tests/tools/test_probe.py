"""The tool that probes saved models: what it writes and prints, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import probe
from fedtan_hpc.config.enums import AlgorithmName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import AlgorithmConfig
from fedtan_hpc.evaluation import probe_records
from fedtan_hpc.reporting import probe_plots
from tests.helpers import commands, jobs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "fedavg"
    jobs.run(jobs.config_of("fedavg", folder, rounds=2))
    return folder


def test_one_rank_and_two_find_the_same(finished: Path, tmp_path: Path) -> None:
    tool, printed = commands.tool("probe.py"), []
    for ranks, out in ((1, finished / "probe"), (2, tmp_path / "two")):
        start = ["python"] if ranks == 1 else ["torchrun", "--nproc-per-node", "2"]
        words = [f"run_dir={finished}", "batches=3", *([f"out={out}"] if ranks == 2 else [])]
        done = commands.forked(*start, tool, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "| both |" in done.stderr
        printed.append(json.loads(done.stdout))
        names = {path.name for path in out.iterdir()}
        assert names == {probe_records.NAME, *probe_plots.FILES}
        found = [*probe_records.read(out)]
        assert [record.round for record in found] == [3, 4, 5]
        totals = [jobs.known(record.total_deviation["both"]) for record in found]
        rows = {row["cause"]: row for row in printed[-1]["results"]}
        assert rows["both"]["deviation"] == pytest.approx(sum(totals) / 3)
        shift = [record.layer_means("mean_shift") for record in found]
        layers = {row["layer"]: row["mean_shift"] for row in printed[-1]["layers"]}
        for name, mean in layers.items():
            assert mean == pytest.approx(sum(each[name] for each in shift) / 3)
    assert [each["setting"]["ranks"] for each in printed] == [1, 2]
    for part in ("results", "layers"):
        for a, b in zip(printed[0][part], printed[1][part], strict=True):
            assert list(a) == list(b)
            for name in a:
                expected = a[name] if isinstance(a[name], str) else pytest.approx(a[name], rel=1e-4)
                assert b[name] == expected
    assert (finished / "summary.json").exists()
    assert not (finished / "failure.json").exists()


MISTAKES = {
    "nothing": ([], "run_dir=null: allowed is the folder of a finished run; name it"),
    "unknown": (["run_dir=none"], "run_dir=none: allowed is the folder of a finished run; choose"),
    "batches=0": (["batches=0"], "batches=0: allowed is a whole number from 1 to 10000"),
    "batches=x": (["batches=x"], "batches=x: allowed is a whole number from 1 to 10000"),
    "best": (["best=yes"], "best=yes: allowed is true or false; leave it out"),
    "option": (["rounds=3"], "rounds=3: not understood; the options here are run_dir, batches"),
    "out": (["out={run}"], "out={run}: allowed is a folder that is not a run's"),
    "threads": (["threads=0"], "threads=0: allowed is a whole number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, finished: Path) -> None:
    words, start = MISTAKES[name]
    given = [word.format(run=finished) for word in words]
    if name not in ("nothing", "unknown"):
        given.append(f"run_dir={finished}")
    with pytest.raises(ConfigError) as caught:
        probe.run(given)
    [line] = caught.value.mistakes
    assert line.startswith(start.format(run=finished))
    assert "\n" not in line


def test_an_unfinished_run_and_one_without_statistics_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    name = AlgorithmConfig(name=AlgorithmName.fbn)
    jobs.run(jobs.small(3, rounds=1, algorithm=name, run_dir=str(folder)))
    with pytest.raises(ConfigError, match="allowed is a run whose BN layers normalise"):
        probe.run([f"run_dir={folder}"])
    (folder / "best.pt").unlink()
    with pytest.raises(ConfigError, match=r"keeps no best\.pt"):
        probe.run([f"run_dir={folder}", "best=true"])
    (folder / "summary.json").unlink()
    with pytest.raises(ConfigError, match="is not finished") as caught:
        probe.run([f"run_dir={folder}"])
    assert str(caught.value).startswith(
        f"run_dir={folder}: allowed is the folder of a finished run"
    )
    assert not (folder / "probe").exists()


def test_a_mistake_ends_with_exit_code_2(tmp_path: Path) -> None:
    done = commands.forked("python", commands.tool("probe.py"), "batches=2", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "probe: run_dir=null: allowed is the folder of a finished run; name it\n"
