"""The folder of a run: its name, its lock, and that no run overwrites another."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from fedtan_hpc.config.enums import ModelSource
from fedtan_hpc.config.errors import ConfigError, FolderInUseError
from fedtan_hpc.config.schema import Config, ModelConfig, OptimizerConfig, PartitionConfig, to_dict
from fedtan_hpc.job import run_dir
from fedtan_hpc.job.run_dir import claimed
from fedtan_hpc.job.run_dir import name as folder_name
from tests.helpers.jobs import config_of, run, run_here, small
from tests.helpers.ranks import on_ranks


def test_a_finished_run_is_returned_and_left_alone(tmp_path: Path) -> None:
    first = run_here(small(1), str(tmp_path))
    before = content_of(tmp_path)
    assert run_here(small(1), str(tmp_path)) == first
    assert content_of(tmp_path) == before


def content_of(folder: Path) -> dict[Path, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_finished_run_of_other_options_is_a_mistake(tmp_path: Path) -> None:
    run_here(small(1), str(tmp_path))
    other = small(1, rounds=4, optimizer=OptimizerConfig(lr=0.2))
    with pytest.raises(ConfigError, match=r"another optimizer\.lr, rounds"):
        run_here(other, str(tmp_path))


def test_a_run_of_version_0_2_with_an_imported_network_is_known() -> None:
    """That version called the network's source target."""
    config = Config(model=ModelConfig(source=ModelSource.import_, target="nets:small"))
    saved = to_dict(config)
    saved["model"]["source"] = "target"
    assert run_dir.differences(saved, config) == []
    assert run_dir.differences(saved, Config()) == ["model.source", "model.target"]


def test_a_mistake_of_the_folder_reaches_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert on_ranks(2, mistake_of, small(2), str(tmp_path / "file")) == ["run_dir", "run_dir"]


def mistake_of(config: Config, folder: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run_here(config, folder)
    return str(caught.value).partition("=")[0]


def test_a_finished_run_that_cannot_be_read_is_a_mistake(tmp_path: Path) -> None:
    run_here(small(1), str(tmp_path))
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        run_here(small(1), str(tmp_path))


def test_a_folder_in_which_a_run_is_going_on_is_refused(tmp_path: Path) -> None:
    with claimed(tmp_path, small(1)), pytest.raises(ConfigError, match="no other run"):
        run_here(small(1), str(tmp_path))
    run_here(small(1), str(tmp_path))


def test_a_look_at_the_lock_does_not_keep_a_run_from_its_folder(tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as the list of runs does for a moment
        Timer(0.5, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        with claimed(tmp_path, small(1)):
            pass


def test_that_another_run_writes_the_folder_reaches_every_rank(tmp_path: Path) -> None:
    with claimed(tmp_path, small(2)):
        assert on_ranks(2, in_use, small(2), str(tmp_path)) == [True, True]


def in_use(config: Config, folder: str) -> bool:
    with pytest.raises(FolderInUseError) as caught:
        run_here(config, folder)
    return caught.value.on_all_ranks


def test_choices_may_be_given_as_text(tmp_path: Path) -> None:
    given = small(1, partition=PartitionConfig(name="shards"))  # type: ignore[arg-type]
    assert run_here(given, str(tmp_path)).rounds == 3
    assert "shards" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("names", [["interrupted-1"], ["interrupted-2"]])
def test_earlier_interruptions_are_kept(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "rounds.jsonl").write_text("precious\n")
    run_here(small(1), str(tmp_path))
    assert len(list(tmp_path.glob("interrupted-*"))) == 2


def test_an_unfinished_run_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_text("precious\n")
    run_here(small(1), str(tmp_path))
    assert (tmp_path / "interrupted-1" / "rounds.jsonl").read_text() == "precious\n"
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 3


def test_folders_are_named_after_all_options() -> None:
    names = {str(folder_name(small(2, seed=seed, batch_size=b))) for seed in (0, 1) for b in (8, 9)}
    assert len(names) == 4
    assert folder_name(small(2)) == folder_name(small(2))
    assert folder_name(small(2, run_dir="here")) == Path("here")


def test_a_file_system_without_locks_is_told(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    run(config_of("fedtan", interrupted))
    assert "has no locks" in capfd.readouterr().err


def test_the_first_word_on_a_failure_stays(tmp_path: Path) -> None:
    run_dir.note_failure(tmp_path, "rank 1: a bad day")
    run_dir.note_failure(tmp_path, "rank 0: another rank has ended")
    assert run_dir.failure(tmp_path) == "rank 1: a bad day"
