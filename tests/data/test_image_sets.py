"""Files of data sets: search paths, downloads, and messages about damaged files.

The tests write small files in the layouts of torchvision, LeCun and Debian.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from fedtan_hpc.config.dataset_info import KNOWN_DATASETS
from fedtan_hpc.config.enums import DataName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import DataConfig
from fedtan_hpc.data import datasets, download, image_files
from fedtan_hpc.data.download import fetch as fetch_files
from fedtan_hpc.runtime.torchvision_import import import_torchvision

TRAIN, TEST = 20, 10
NAMES = image_files._IDX
CIFAR_FILES = {
    "cifar10": ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], "batches.meta"),
    "cifar100": (["train"], ["test"], "meta"),
}
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch: Patch, tmp_path: Path) -> None:
    """Sets up 20 + 10 samples per data set, an empty working folder, no Debian and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(image_files, "_DEBIAN", tmp_path / "debian")
    for name, info in list(KNOWN_DATASETS.items()):
        monkeypatch.setitem(KNOWN_DATASETS, name, info._replace(train=TRAIN, test=TEST))
    utils = import_torchvision().datasets.utils
    for function in ("_urlretrieve", "_get_redirect_url"):
        monkeypatch.setattr(utils, function, no_network)


def no_network(*_: object, **__: object) -> None:
    raise URLError("no\nroute to host")


def of(name: str, root: Path | str | None = None) -> DataConfig:
    return DataConfig(name=DataName(name), root=None if root is None else str(root))


def pixels(name: str) -> image_files.Bytes:
    shape = KNOWN_DATASETS[DataName(name)].shape
    return np.random.default_rng(1).integers(256, size=(TRAIN + TEST, *shape), dtype=np.uint8)


def labels() -> image_files.Bytes:
    return (np.arange(TRAIN + TEST) % 10).astype(np.uint8)


def idx(values: image_files.Bytes) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()


def write_idx(folder: Path, zipped: bool = False) -> None:
    """Writes the four files of MNIST or Fashion-MNIST."""
    folder.mkdir(parents=True)
    images = pixels("mnist")[:, 0]
    arrays = images[:TRAIN], labels()[:TRAIN], images[TRAIN:], labels()[TRAIN:]
    for name, values in zip(NAMES, arrays, strict=True):
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (folder / name).write_bytes(idx(values))


def write_cifar(folder: Path, name: str, monkeypatch: Patch) -> None:
    """Writes the pickled files of CIFAR and tells torchvision their checksums."""
    folder.mkdir(parents=True)
    train, test, meta = CIFAR_FILES[name]
    key = "labels" if name == "cifar10" else "fine_labels"
    rows = pixels(name).reshape(TRAIN + TEST, -1)
    pieces = [*np.array_split(np.arange(TRAIN), len(train)), np.arange(TRAIN, TRAIN + TEST)]
    sums = {}
    for file, piece in zip([*train, *test], pieces, strict=True):
        sums[file] = dumped(folder / file, {"data": rows[piece], key: labels()[piece].tolist()})
    kind = getattr(import_torchvision().datasets, name.upper())
    names = {kind.meta["key"]: [str(i) for i in range(10)]}
    monkeypatch.setitem(kind.meta, "md5", dumped(folder / meta, names))
    monkeypatch.setattr(kind, "train_list", [[file, sums[file]] for file in train])
    monkeypatch.setattr(kind, "test_list", [[file, sums[file]] for file in test])


def dumped(path: Path, content: object) -> str:
    path.write_bytes(pickle.dumps(content))
    return md5(path)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def assert_read(config: DataConfig) -> None:
    """Asserts that all pixels and labels are read, and that ``datasets.load`` accepts them."""
    fetch_files(config)
    found, found_labels = image_files.read(config)
    assert np.array_equal(found, pixels(str(config.name)))
    assert found.dtype == np.uint8
    assert np.array_equal(found_labels, labels())
    dataset = datasets.load(config, seed=0)
    assert (len(dataset.train), len(dataset.test)) == (TRAIN, TEST)
    assert dataset.take(dataset.test).inputs.shape == (TEST, *KNOWN_DATASETS[config.name].shape)


def error_line(config: DataConfig, act: Callable[[DataConfig], object] = fetch_files) -> str:
    with pytest.raises(ConfigError) as caught:
        act(config)
    [line] = caught.value.mistakes
    assert "\n" not in line
    assert line.startswith(f"data.root={config.root or 'null'}: allowed is ")
    return line


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_are_found_in_torchvisions_layout_and_by_themselves(
    name: str, zipped: bool, tmp_path: Path
) -> None:
    folder = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}[name]
    write_idx(tmp_path / "data" / folder, zipped)
    assert_read(of(name))
    assert_read(of(name, tmp_path / "data"))
    assert_read(of(name, tmp_path / "data" / folder))
    assert_read(of(name, "data"))


def test_debians_copy_is_fashion_mnist_alone(tmp_path: Path) -> None:
    write_idx(tmp_path / "debian", zipped=True)
    assert_read(of("fashion_mnist"))
    error_line(of("mnist"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_found_in_torchvisions_layout(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    write_cifar(tmp_path / "data" / image_files.SOURCES[DataName(name)].folder, name, monkeypatch)
    assert_read(of(name))
    assert_read(of(name, tmp_path / "data"))


def test_data_sets_without_files_need_none() -> None:
    for name in ("digits", "synthetic"):
        fetch_files(of(name))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("root", [None, "elsewhere"])
def test_without_a_network_it_is_said_what_goes_where(
    name: str, root: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = error_line(of(name, root))
    place = {"mnist": "/MNIST/raw", "fashion_mnist": "/FashionMNIST/raw"}.get(name, "")
    assert f" into {tmp_path / (root or 'data')}{place}, from " in line
    assert "no route to host" in line
    files = [f"{f}.gz" for f in NAMES] if place else [f"cifar-{name[5:]}-python.tar.gz"]
    assert f"; put {', '.join(files)} into " in line
    assert ("dataset-fashion-mnist" in line) == (name == "fashion_mnist")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_ranks_that_load_before_anyone_has_fetched_are_told_so() -> None:
    assert "have not been fetched" in error_line(of("cifar10"), lambda c: datasets.load(c, 0))


def test_a_root_that_cannot_be_a_folder_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "this is a file" in error_line(of("mnist", tmp_path / "file"))
    assert "could not be downloaded" in error_line(of("mnist", tmp_path / "file" / "below"))


def test_a_download_is_seen_whole_or_not_at_all(tmp_path: Path, monkeypatch: Patch) -> None:
    seen = []

    def download(url: str, download_root: str, filename: str, md5: str) -> None:
        seen.append(image_files.find(of("mnist")))
        if not (Path(download_root) / NAMES[0]).exists():
            shutil.copytree(tmp_path / "source", download_root, dirs_exist_ok=True)

    write_idx(tmp_path / "source")
    monkeypatch.setattr(
        import_torchvision().datasets.mnist, "download_and_extract_archive", download
    )
    assert_read(of("mnist"))
    assert seen
    assert set(seen) == {None}
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]
    seen.clear()
    fetch_files(of("mnist"))
    assert not seen


def test_another_machine_may_be_faster(tmp_path: Path, monkeypatch: Patch) -> None:
    def download(url: str, root: str, filename: str, md5: str) -> None:
        for place in (Path(root), tmp_path / "data"):
            write_cifar(place / "cifar-10-batches-py", "cifar10", monkeypatch)

    monkeypatch.setattr(
        import_torchvision().datasets.cifar, "download_and_extract_archive", download
    )
    assert_read(of("cifar10"))


def test_an_archive_put_there_by_hand_is_unpacked(tmp_path: Path, monkeypatch: Patch) -> None:
    write_cifar(tmp_path / "cifar-100-python", "cifar100", monkeypatch)
    archive = tmp_path / "data" / "cifar-100-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as packed:
        packed.add("cifar-100-python")
    monkeypatch.setattr(import_torchvision().datasets.CIFAR100, "tgz_md5", md5(archive))
    assert_read(of("cifar100"))
    assert archive.is_file()


def test_an_archive_of_another_checksum_is_damaged(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"half")
    line = error_line(of("cifar10", tmp_path))
    assert str(archive) in line
    assert "checksum" in line
    assert archive.read_bytes() == b"half"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def other_sizes(path: Path) -> None:
    path.write_bytes(gzip.compress(idx(labels()[: TRAIN - 1])))


def label_of_none(path: Path) -> None:
    path.write_bytes(gzip.compress(idx(labels()[:TRAIN] + 1)))


def other_format(path: Path) -> None:
    path.write_bytes(gzip.compress(b"no"))


def other_bytes(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize(
    "harm", [cut, other_sizes, label_of_none, other_format, other_bytes, Path.unlink]
)
def test_damaged_idx_files_are_a_mistake(harm: Callable[[Path], None], tmp_path: Path) -> None:
    write_idx(tmp_path / "files", zipped=True)
    harm(tmp_path / "files" / f"{NAMES[1]}.gz")
    config = of("fashion_mnist", tmp_path / "files")
    for act in (fetch_files, lambda config: datasets.load(config, 0)):
        assert f"{tmp_path / 'files'} is damaged" in error_line(config, act)


def test_images_of_another_size_are_a_mistake(tmp_path: Path) -> None:
    write_idx(tmp_path / "files")
    (tmp_path / "files" / NAMES[0]).write_bytes(idx(np.zeros((TRAIN, 14, 14), np.uint8)))
    assert "is damaged" in error_line(of("mnist", tmp_path / "files"))


def test_the_other_mnist_is_a_mistake(tmp_path: Path) -> None:
    write_idx(tmp_path / "files")
    others = labels()[:TRAIN]
    others[:5] = 9, 0, 0, 3, 0
    (tmp_path / "files" / NAMES[1]).write_bytes(idx(others))
    assert "fashion_mnist's; name another folder" in error_line(of("mnist", tmp_path / "files"))
    fetch_files(of("fashion_mnist", tmp_path / "files"))


@pytest.mark.parametrize("harm", [cut, Path.unlink])
def test_damaged_cifar_files_are_a_mistake(
    harm: Callable[[Path], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder, "cifar10", monkeypatch)
    harm(folder / "data_batch_3")
    assert f"{folder} is damaged" in error_line(of("cifar10", tmp_path))


@pytest.mark.parametrize("error", [ImportError("none"), RuntimeError("another\nCUDA version")])
def test_no_torchvision_that_works_is_a_mistake(error: Exception, monkeypatch: Patch) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(
        ConfigError, match=r"^torchvision=missing: .*; pip install torchvision"
    ) as e:
        fetch_files(of("cifar10"))
    assert "\n" not in str(e.value)


def test_sockets_are_patient_again_after_a_download() -> None:
    import socket

    with download._download_settings():
        assert socket.getdefaulttimeout() == 20
    assert socket.getdefaulttimeout() is None
