"""Comparisons: what is run, what is not run again, and files that say what the runs' files say."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import signal
import statistics
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtan_hpc.config.errors import Stopped
from fedtan_hpc.config.schema import Config
from fedtan_hpc.reporting import compare, overview, progress
from fedtan_hpc.runtime.signals import Interrupted
from tests.helpers.ranks import on_ranks

SHORT = ["rounds=2", "local_steps=1", "eval_every=1", "batch_size=16"]
TWO = ["methods=[fedtan,fedavg]", "seeds=[0,1]", *SHORT]


class Left(BaseException):
    """The process has exited."""


@pytest.fixture(autouse=True)
def _leaving_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that is not to be changed."""
    out = tmp_path_factory.mktemp("compare")
    compare.main([*TWO, f"out={out}"])
    return out


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def times(out: Path) -> dict[Path, int]:
    """When each run wrote its rounds and its result."""
    found = [*out.glob("runs/*/rounds.jsonl"), *out.glob("runs/*/summary.json")]
    return {path: path.stat().st_mtime_ns for path in found}


def exit_code(words: list[str]) -> int:
    with pytest.raises(Left) as left:
        compare.main(words)
    return int(left.value.args[0])


def test_each_method_and_seed_has_a_run(whole: Path) -> None:
    names = {path.name for path in (whole / "runs").iterdir()}
    assert names == {"fedtan-seed0", "fedtan-seed1", "fedavg-seed0", "fedavg-seed1"}
    for name in names:
        text = (whole / "runs" / name / "config.yaml").read_text()
        assert f"seed: {name[-1]}\n" in text
        assert f"algorithm:\n  name: {name[:6]}\n" in text


def test_csv_has_the_figures_of_the_runs(whole: Path) -> None:
    with open(whole / "compare.csv", encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        told = records(whole / "runs" / f"{row['method']}-seed{row['seed']}")
        number = int(row["round"])
        record = told[number - 1]
        assert record["round"] == number
        for name in ("train_loss", "pooled_train_loss", "test_accuracy", "test_loss"):
            assert float(row[name]) == record[name]
        assert int(row["payload_bytes"]) == sum(r["payload_bytes"] for r in told[:number]) > 0
        assert row["clients_own_mix_accuracy_mean"] == ""


def test_markdown_has_mean_and_deviation_best_first(whole: Path) -> None:
    text = (whole / "compare.md").read_text()
    expected = []
    for method in ("fedtan", "fedavg"):
        runs = [records(whole / "runs" / f"{method}-seed{seed}") for seed in (0, 1)]
        last = [100 * told[-1]["test_accuracy"] for told in runs]
        losses = [told[-1]["test_loss"] for told in runs]
        sent = statistics.mean(r["payload_bytes"] for told in runs for r in told) / 1000
        messages = {"fedtan": 5, "fedavg": 1}[method]
        line = (
            f"| {method} | 2 | {statistics.mean(last):.1f} ± {statistics.stdev(last):.1f} "
            f"| {statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f} | {messages} "
            f"| {sent:.1f} |"
        )
        expected.append((-statistics.mean(last), line))
    table = [line for line in text.splitlines() if line.startswith("| fed")]
    assert table == [line for _, line in sorted(expected)]
    assert "    python -m fedtan_hpc.compare 'methods=[fedtan,fedavg]'" in text
    for option in ("rounds=2", "local_steps=1", "eval_every=1", "batch_size=16"):
        assert f"`{option}`" in text
    assert "Not finished" not in text


def test_picture_is_a_png(whole: Path) -> None:
    image = (whole / "compare.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 20_000


def test_nothing_runs_twice_and_a_new_seed_adds_only_itself(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(whole, tmp_path)
    before = times(out)
    words = ["methods=[fedavg,fedtan]", *SHORT, f"out={out}"]
    compare.main([*words, "seeds=[1,0]"])
    assert times(out) == before
    assert capsys.readouterr().out.count("was finished") == 4
    compare.main([*words, "seeds=[2]"])
    after = times(out)
    assert {path: after[path] for path in before} == before
    assert {path.parent.name for path in after.keys() - before.keys()} == {
        "fedtan-seed2",
        "fedavg-seed2",
    }
    text = (out / "compare.md").read_text()
    assert text.count("| 3 |") == 2
    assert "Run by other commands: " in text
    assert "fedtan seed 0" in text


def copied(whole: Path, tmp_path: Path) -> Path:
    """Finished runs; they stay in place, for their options name their folder."""
    (tmp_path / "runs").mkdir()
    for run in (whole / "runs").iterdir():
        (tmp_path / "runs" / run.name).symlink_to(run)
    (tmp_path / "settings.yaml").write_text((whole / "settings.yaml").read_text())
    return tmp_path


def test_an_interrupted_comparison_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["methods=[fedavg]", "seeds=[0,1]", *SHORT, f"out={tmp_path}"]
    told = []
    note: Callable[[Any, Any], None] = progress.Following.round_ended

    def interrupted(self: progress.Following, record: Any) -> None:
        told.append(record)
        if len(told) == 4:
            raise Interrupted
        note(self, record)

    monkeypatch.setattr(progress.Following, "round_ended", interrupted)
    assert exit_code(words) == 130
    assert capsys.readouterr().err == "compare: interrupted\n"
    before = times(tmp_path)
    assert not (tmp_path / "runs" / "fedavg-seed1" / "summary.json").exists()
    assert not (tmp_path / "compare.md").exists()
    compare.main(words)
    after = times(tmp_path)
    assert [p.parent.name for p in before if after[p] == before[p]] == ["fedavg-seed0"] * 2
    assert [r["round"] for r in records(tmp_path / "runs" / "fedavg-seed1")] == [1, 2]
    assert "| fedavg | 2 |" in (tmp_path / "compare.md").read_text()


def test_a_run_that_another_process_holds_is_left_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "runs" / "fedavg-seed0"
    held.mkdir(parents=True)
    with open(held / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compare.main(["methods=[fedavg]", "seeds=[0,1]", *SHORT, f"out={tmp_path}"])
    assert "fedavg seed 0: skipped: another process is running it" in capsys.readouterr().out
    text = (tmp_path / "compare.md").read_text()
    assert "| fedavg | 1 |" in text
    assert "Not finished: fedavg seed 0." in text


def test_a_method_with_options_and_one_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = '[fedbn,"fedtan algorithm.synchronise_every=2","fedavg optimizer.lr=1e30"]'
    assert exit_code([f"methods={methods}", "seeds=0", *SHORT, f"out={tmp_path}"]) == 1
    told = capsys.readouterr()
    assert told.err == "compare: 1 of 3 runs failed\n"
    assert "fedavg, optimizer.lr=1e+30 seed 0: failed: round 1: " in told.out
    text = (tmp_path / "compare.md").read_text()
    assert "| fedtan, synchronise_every=2 | 1 |" in text
    assert "Not finished: fedavg, optimizer.lr=1e+30 seed 0." in text
    last = records(tmp_path / "runs" / "fedbn-seed0")[-1]
    own = 100 * last["clients_own_mix_accuracy_mean"]
    assert f"| fedbn | 1 | {100 * last['test_accuracy']:.1f} | {own:.1f} |" in text


def test_natural_clients_with_test_samples_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number of clients, which the data decide, does not tell runs apart."""
    words = ["methods=[fedbn,fedavg]", "seeds=[0]", *SHORT, "model=cnn", f"out={tmp_path}"]
    words += ["data=import", "data.target=tests.helpers.own_data:sites", "partition=natural"]
    compare.main(words)
    before = times(tmp_path)
    compare.main(words)
    assert times(tmp_path) == before
    text = (tmp_path / "compare.md").read_text()
    assert text.startswith("# import, cnn, natural, 1 local steps\n")
    assert "| clients' own accuracy, % |" in text
    for name in ("fedbn", "fedavg"):
        last = records(tmp_path / "runs" / f"{name}-seed0")[-1]
        own = 100 * last["clients_own_mix_accuracy_mean"]
        assert f"| {name} | 1 | {100 * last['test_accuracy']:.1f} | {own:.1f} |" in text
    assert "\nfedbn: there is no one global model" in text
    assert "Run by other commands" not in text


def on_each_rank(words: list[str]) -> str:
    """What a rank prints."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    try:
        with redirect_stdout(io.StringIO()) as told:
            compare.main(words)
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    return told.getvalue()


def test_on_two_ranks_rank_0_alone_writes_and_shows(tmp_path: Path) -> None:
    words = ["methods=[fedtan]", "seeds=[0]", *SHORT, f"out={tmp_path}"]
    first, second = on_ranks(2, on_each_rank, words)
    assert "fedtan seed 0: test accuracy" in first
    assert second == ""
    told = records(tmp_path / "runs" / "fedtan-seed0")
    assert len(told) == 2
    sent = told[0]["payload_bytes"] / 1000
    assert told[0]["comm_bytes"] == told[0]["payload_bytes"]
    [line] = [x for x in (tmp_path / "compare.md").read_text().splitlines() if "| fedtan" in x]
    assert line.endswith(f"| {told[0]['comm_messages']} | {sent:.1f} |")


WRONG = [
    (["rounds=0", "methods=fedtan"], "rounds=0: "),
    (["methods=[fedprox]"], "algorithm=fedprox: "),
    (["methods=[fedtan"], "methods=[fedtan: "),
    (["methods=[]"], "methods=[]: "),
    (["methods=['fedavg seed=1']"], "seed=1: "),
    (["methods=['fedbn algorithm.synchronised_steps=2']"], "algorithm.synchronised_steps=2: "),
    (["seeds=[0,x]"], "seeds=[0,x]: "),
    (["seeds=[-1]", "methods=fedtan"], "seeds=[-1]: "),
    (["seed=1"], "seed=1: "),
    (["algorithm=fedavg"], "algorithm=fedavg: "),
    (["run_dir=here"], "run_dir=here: "),
    (["out="], "out=: "),
    (["out=/dev/null/x", "methods=fedtan"], "out=/dev/null/x: "),
    (["experiment=nothing"], "experiment=nothing: "),
    (["-m", "rounds=2"], "-m: "),
    (["--bogus"], "unrecognized arguments: --bogus"),
]


@pytest.mark.parametrize(("words", "start"), WRONG, ids=lambda v: str(v))
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str],
    start: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(words) == 2
    told = capsys.readouterr()
    [line] = told.err.splitlines()
    assert line.startswith(f"compare: {start}")
    assert told.out == ""
    assert not list(tmp_path.iterdir())


def test_a_folder_is_for_one_comparison(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = times(whole)
    assert exit_code([*TWO, "rounds=3", "clients=4", f"out={whole}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "another clients, rounds: choose another" in line
    assert times(whole) == before


def test_options_that_change_no_result_may_differ(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also options that did not exist when the folder was filled."""
    out = copied(whole, tmp_path)
    settings = yaml.safe_load((whole / "settings.yaml").read_text())
    del settings["callbacks"], settings["server"]["tau"], settings["checkpoint"]["keep"]
    (out / "settings.yaml").write_text(yaml.safe_dump(settings))
    compare.main([*TWO, "checkpoint.every=1", "callbacks=[my.module:Plot]", f"out={out}"])
    told = capsys.readouterr().out
    assert told.count("was finished") == 4
    assert "| fedavg | 2 |" in told


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n"])
def test_settings_that_cannot_be_read_are_a_mistake(
    text: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(whole, tmp_path)
    (out / "settings.yaml").write_text(text)
    assert exit_code([*TWO, f"out={out}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "allowed is a new folder, or one with a whole settings.yaml" in line


@pytest.mark.parametrize("words", [[], ["--help"], ["-h", "rounds=0"]], ids=str)
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    compare.main(words)
    assert "methods=[...]" in capsys.readouterr().out


def test_an_overview_has_a_column_for_each_comparison(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "fedbn"
    compare.main(["methods=[fedavg,fedbn]", "seeds=[0]", *SHORT, f"out={other}"])
    capsys.readouterr()
    overview.main([str(whole), str(other)])
    heads, _, *rows = (line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines())
    assert heads == ["method", whole.name, "fedbn"]
    cells = {method: values for method, *values in rows}
    assert set(cells) == {"fedtan", "fedavg", "fedbn"}
    last = records(other / "runs" / "fedbn-seed0")[-1]
    mean, own = last["test_accuracy"], last["clients_own_mix_accuracy_mean"]
    assert cells["fedbn"] == ["", f"{100 * mean:.1f} ({100 * own:.1f})"]
    assert cells["fedtan"][1] == ""
    assert " ± " in cells["fedtan"][0]
    with pytest.raises(SystemExit):
        overview.main([str(tmp_path)])


def test_runs_of_another_task_are_compared_by_its_first_metric(tmp_path: Path) -> None:
    words = ["data=import", "data.target=tests.helpers.task_data:sites", "data.options.kind=masks"]
    words += ["task=segmentation", "task.ignore_index=255", "partition=natural", "model=import"]
    words += ["model.target=tests.helpers.task_data:pixels", "methods=[fedtan,fedbn]", "seeds=[0]"]
    compare.main([*words, *SHORT, f"out={tmp_path}"])
    text = (tmp_path / "compare.md").read_text()
    last = {run: records(run)[-1] for run in tmp_path.glob("runs/*")}
    assert "| method | seeds | test iou, % | clients' own iou, % | test loss |" in text
    best = max(last.values(), key=lambda record: float(record["test_iou"]))
    first_row = next(line for line in text.splitlines() if line.startswith("| fed"))
    own = 100 * best["clients_own_mix_iou_mean"]
    assert f"| 1 | {100 * best['test_iou']:.1f} | {own:.1f} |" in first_row
    rows = list(csv.DictReader(io.StringIO((tmp_path / "compare.csv").read_text())))
    assert {float(row["test_iou"]) for row in rows} >= {r["test_iou"] for r in last.values()}
    assert (tmp_path / "compare.png").exists()


def test_a_signal_ends_the_whole_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began = []

    def stopped(config: Config, following: object) -> str:
        began.append(config.seed)
        raise Stopped("stopped by SIGTERM after round 1", signal.SIGTERM)

    monkeypatch.setattr(compare, "_run", stopped)
    assert exit_code([*TWO, f"out={tmp_path}"]) == 128 + signal.SIGTERM
    assert began == [0]
    assert "compare: stopped by SIGTERM after round 1" in capsys.readouterr().err
