"""The room files: what may be read and written, whose it may be, and that nobody goes round it."""

from __future__ import annotations

import ast
import gzip
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import fedtan_hpc
from fedtan_hpc.config.enums import RunDirMode
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.files import atomic_files, folders, owners, reading
from fedtan_hpc.files.reading import FileError
from fedtan_hpc.job import resume, run_dir
from tests.helpers.commands import ROOT
from tests.helpers.jobs import config_of, run, run_until, small
from tests.test_house import FILES, name_of, room_of, tree

STRANGER = 54321
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to another user")

OPENERS = ("open", "fdopen", "read_text", "read_bytes", "copyfile", "fromfile")
LOADERS = {"json.load", "yaml.load", "yaml.safe_load", "OmegaConf.load", "torch.load", "np.load"}
LOADERS |= {"np.loadtxt", "np.genfromtxt", "gzip.open", "gzip.decompress", "zipfile.ZipFile"}
MAY_OPEN = {
    "batchnorm/compile_ops": "its own source, for a digest",
    "data/federated_data": "PIL decodes a file that reading.opened has opened",
    "distributed/watchdog": "/proc, which tells when a process began",
    "job/run_dir": "a lock that folders.open_lock has opened",
    "job/summary": "/proc/cpuinfo",
    "launch/requeue": "the package's own batch script",
    "launch/submitit_jobs": "/dev/null, to keep the streams from background jobs",
    "runtime/free_memory": "/proc and /sys, which tell of memory",
}


def opens(path: Path) -> set[str]:
    """Calls in a file that open a file, by their names in the code."""
    calls = {ast.unparse(n.func) for n in ast.walk(tree(path)) if isinstance(n, ast.Call)}
    return {
        call
        for call in calls
        if (call in LOADERS or call.rpartition(".")[2] in OPENERS)
        and not call.startswith("reading.")
    }


def test_one_room_alone_opens_files() -> None:
    found = {name_of(path) for path in FILES if room_of(path) != "files" and opens(path)}
    assert found == set(MAY_OPEN)


def test_an_opener_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "new.py"
    for line in ("open('x')", "Path('x').read_text()", "torch.load('x')", "OmegaConf.load('x')"):
        path.write_text(line)
        tree.cache_clear()
        assert opens(path), line
    tree.cache_clear()


@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_only_files_are_opened(kind: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "x"
    kind(path)
    for act in (
        lambda: reading.read_bytes(path),
        lambda: atomic_files.append_text(path, "x"),
        lambda: os.close(folders.open_lock(path)),
    ):
        with pytest.raises((FileError, OSError), match="x"):
            act()


def test_what_inflates_too_far_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(bytes(10**7)))
    assert len(reading.read_inflated(path, 10**7)) == 10**7
    with pytest.raises(FileError, match="inflates to more than the 999 bytes"):
        reading.read_inflated(path, 999)


@pytest.mark.parametrize(
    ("mode", "folder", "file"), [("private", 0o700, 0o600), ("group", 0o750, 0o640)]
)
def test_a_runs_folder_is_closed_to_others(
    mode: str, folder: int, file: int, tmp_path: Path
) -> None:
    """Whatever the umask is."""
    before = os.umask(0o077 if mode == "group" else 0)
    try:
        path = tmp_path / "runs" / "a"
        config = config_of("fedbn", path, rounds=2, run_dir_mode=RunDirMode(mode))
        config.tracking.to = []
        run(config)
    finally:
        os.umask(before)
    modes = {each: stat.S_IMODE(each.stat().st_mode) for each in (path, *path.rglob("*"))}
    lock = path / ".lock"
    assert modes.pop(lock) == 0o600
    assert modes == {each: folder if each.is_dir() else file for each in modes}
    assert len(modes) > 6


def test_a_folder_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with run_dir.claimed(tmp_path, small(1)):
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


@pytest.mark.parametrize("name", ["model.pt", "rounds.jsonl", "summary-is-no-file", "checkpoints"])
def test_what_bars_a_file_is_found_before_training(name: str, tmp_path: Path) -> None:
    name = "summary.json" if name.startswith("summary") else name
    path = tmp_path / name
    path.touch() if name == "checkpoints" else path.mkdir()
    with pytest.raises(ConfigError, match=name):
        run(config_of("fedavg", tmp_path))
    assert {each.name for each in tmp_path.iterdir()} <= {name, ".lock"}


@is_root
@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/round-000004.pt", "rounds.jsonl"])
def test_what_another_user_owns_is_not_resumed_from(name: str, interrupted: Path) -> None:
    os.chown(interrupted / name, STRANGER, -1)
    config = config_of("fedtan", interrupted)
    with pytest.raises(ConfigError, match=f"another user .number {STRANGER}.*resume_trust=true"):
        resume.load_checkpoint(interrupted, config)
    config.resume_trust = True
    assert resume.load_checkpoint(interrupted, config).content["round"] == 5


def test_a_run_does_not_begin_where_it_could_not_go_on(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    config = small(2, rounds=1, run_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"every user can write it; .*resume_trust=true"):
        fedtan_hpc.run(config, callbacks=[])
    config.resume_trust = True
    fedtan_hpc.run(config, callbacks=[])


def test_a_file_system_without_modes_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    monkeypatch.setattr(Path, "chmod", refused)
    fedtan_hpc.run(small(2, rounds=1, run_dir=str(tmp_path / "run")), callbacks=[])
    assert (tmp_path / "run" / "summary.json").exists()


def test_what_every_user_can_write_is_not_resumed_from(interrupted: Path) -> None:
    (interrupted / "checkpoints" / "round-000005.pt").chmod(0o666)
    with pytest.raises(ConfigError, match="every user can write it"):
        resume.load_checkpoint(interrupted, config_of("fedtan", interrupted))


def test_an_owner_is_one_who_is_not_root_and_not_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the tests do not run as root."""
    path = tmp_path / "x"
    path.touch()
    owners.check([path], "")
    status = list(os.stat(path))
    status[stat.ST_UID] = STRANGER
    monkeypatch.setattr(os, "stat", lambda path: os.stat_result(status))
    with pytest.raises(FileError, match="another user"):
        owners.check([path], "")
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    owners.check([path], "")


def test_modes_do_not_count_where_the_file_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o777)
    with pytest.raises(FileError, match="every user can write it"):
        owners.check([path], "")
    owners._new_file.cache_clear()
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: path.open())
    owners.check([path], "")
    owners._new_file.cache_clear()


@is_root
def test_a_strangers_model_is_not_loaded(tmp_path: Path) -> None:
    run(config_of("fedavg", tmp_path / "run", rounds=1))
    os.chown(tmp_path / "run" / "config.yaml", STRANGER, -1)
    with pytest.raises(ValueError, match="trust=True"):
        fedtan_hpc.load_model(tmp_path / "run")
    assert fedtan_hpc.load_model(tmp_path / "run", trust=True).state_dict()


def test_a_folder_as_the_newest_checkpoint_is_left_out(interrupted: Path) -> None:
    newest = interrupted / "checkpoints" / "round-000005.pt"
    newest.unlink()
    newest.mkdir()
    assert run(config_of("fedtan", interrupted)).resumed_after == [4]


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    config = config_of("fedtan", tmp_path / "run")
    run_until(config, 5)
    return tmp_path / "run"


def test_the_package_is_that_of_this_checkout() -> None:
    assert Path(fedtan_hpc.__file__).parent == ROOT / "fedtan_hpc"
