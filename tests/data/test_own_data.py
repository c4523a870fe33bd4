"""Data of the user's own: what may be given, who has which samples, and mistakes in one line."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fedtan_hpc
from fedtan_hpc import cli
from fedtan_hpc.config.enums import PartitionName
from fedtan_hpc.config.errors import ConfigError, RunError
from fedtan_hpc.config.schema import Config, DataConfig
from fedtan_hpc.data import datasets
from fedtan_hpc.data.augmentation import ImageSteps
from fedtan_hpc.data.batching import Dataset, Samples
from fedtan_hpc.data.federated_data import Piece, load_own
from fedtan_hpc.data.own.items import ItemReader
from fedtan_hpc.job import run_dir
from fedtan_hpc.models import small_networks
from tests.helpers.jobs import state_of
from tests.helpers.own_data import HERE, write_images

FAST = ["rounds=2", "local_steps=2", "batch_size=8", "eval_every=1", "model=cnn"]


def composed(*words: str) -> Config:
    [config] = cli.compose([*FAST, *words])
    return config


def imported(name: str, *words: str) -> Config:
    return composed("data=import", f"data.target={HERE}:{name}", *words)


def trained(config: Config, folder: Path) -> Any:
    config.run_dir = str(folder)
    return fedtan_hpc.run(config, callbacks=[])


def mistake_of(config: Config, folder: Path, kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        trained(config, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def loaded(name: str, **options: Any) -> Dataset:
    target = f"{HERE}:{name}"
    dataset = datasets.load(DataConfig(name="import", target=target, **options), seed=0)  # type: ignore[arg-type]
    if dataset.begin_reading is not None:
        dataset.begin_reading()
    return dataset


@pytest.mark.parametrize("kind", ["bytes", "image", "array"])
def test_arrays_and_images_train(kind: str, tmp_path: Path) -> None:
    config = imported("pair", f"data.options={{kind: {kind}}}", "partition=iid")
    summary = trained(config, tmp_path)
    assert summary.test_loss < 3


def test_inputs_that_are_read_only_become_tensors_of_their_own() -> None:
    """Such as grey images of PIL, and files that are mapped into memory."""
    frozen = np.arange(30, dtype=np.uint8).reshape(5, 6)
    frozen.flags.writeable = False
    numbers = frozen.astype(np.float32)
    numbers.flags.writeable = False
    for value in (frozen, numbers, Image.fromarray(frozen)):
        reader = ItemReader([Piece("train", [(value, 0)])], ImageSteps(None, None, None), 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reader.find_kind(0)
            read = reader.batch(np.array([0]), None)
        assert np.array_equal(read.reshape(5, 6).numpy(), frozen)


@pytest.mark.parametrize("kind", ["dict", "tuple"])
@pytest.mark.parametrize("mode", ["sequential", "stacked"])
def test_inputs_may_be_several_tensors(kind: str, mode: str, tmp_path: Path) -> None:
    words = [f"model.target={HERE}:two_inputs", "model=import", f"cohort.mode={mode}"]
    words += ["partition=shards", f"data.options.kind={kind}", "precision=float64"]
    assert trained(imported("pair", *words), tmp_path).test_loss < 3


def test_pixels_are_normalised_by_those_of_training() -> None:
    dataset = loaded("pair")
    inputs = dataset.take(dataset.train).inputs
    assert inputs.shape == (90, 3, 12, 10)
    assert inputs.mean((0, 2, 3)).abs().max() < 1e-5
    assert (inputs.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_clients_may_be_indices_and_some_have_test_samples() -> None:
    dataset = loaded("listed")
    assert dataset.classes == 4
    assert dataset.clients is not None
    assert [each.tolist() for each in dataset.clients] == [
        list(range(20)),
        list(range(20, 50)),
        list(range(50, 90)),
    ]
    assert {k: each.tolist() for k, each in dataset.client_tests.items()} == {
        0: list(range(90, 100))
    }
    assert len(dataset.test) == 30


def test_clients_may_be_data_sets_with_tests_of_their_own(tmp_path: Path) -> None:
    summary = trained(imported("sites", "partition=natural"), tmp_path)
    dataset = loaded("sites")
    assert [len(each) for each in dataset.clients or []] == [24, 30, 36]
    assert [len(each) for each in dataset.client_tests.values()] == [8, 14, 20]
    assert trained(imported("sites", "partition=natural"), tmp_path) == summary  # it is finished
    assert summary.clients_judged == 3
    model = small_networks.cnn(3, 3)
    model.load_state_dict(state_of(tmp_path))
    right = [accuracy(model, dataset.take(each)) for each in dataset.client_tests.values()]
    assert summary.clients_own_mix_accuracy_mean == pytest.approx(np.mean(right), abs=1e-6)
    assert summary.test_accuracy == pytest.approx(np.average(right, weights=[8, 14, 20]), abs=1e-6)


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples) -> float:
    return float((model.eval()(samples.inputs).argmax(1) == samples.labels).double().mean())


def test_natural_tests_are_only_those_of_natural_clients(tmp_path: Path) -> None:
    assert trained(imported("sites", "partition=iid", "clients=2"), tmp_path).clients_judged is None


def test_targets_that_a_transform_changes_are_read() -> None:
    assert loaded("relabelled").labels_N[:3].tolist() == [1, 2, 0]
    assert loaded("listed").labels_N[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("way", ["device", "stream"])
def test_more_natural_clients_than_the_default(way: str, tmp_path: Path) -> None:
    words = ["partition=natural", "clients_per_round=7", f"data.loading={way}"]
    assert trained(imported("many", *words), tmp_path).clients_judged == 8


def test_few_samples_of_many_classes_are_split_at_random() -> None:
    dataset = loaded("few_of_many")
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (17, 5, 4)


def test_without_tests_each_client_gives_a_fifth() -> None:
    dataset = loaded("sites", options={"tests": False})
    assert [len(each) for each in dataset.clients or []] == [19, 24, 28]
    assert [len(each) for each in dataset.client_tests.values()] == [5, 6, 8]
    everything = np.concatenate([*(dataset.clients or []), *dataset.client_tests.values()])
    assert np.array_equal(np.sort(everything), np.arange(90))


@pytest.mark.parametrize("algorithm", ["fedbn", "fedavg"])
def test_clients_are_judged_on_their_own_tests(algorithm: str, tmp_path: Path) -> None:
    config = imported("sites", "partition=natural", f"algorithm={algorithm}", "rounds=4")
    summary = trained(config, tmp_path)
    assert summary.clients_judged == 3
    assert summary.clients_own_mix_accuracy_mean is not None
    assert (summary.clients_test_accuracy_mean is None) == (algorithm == "fedavg")


def test_a_finished_run_with_natural_clients_is_shown_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data decide the number of clients, which is not the option's default."""
    config = imported("sites", "partition=natural", f"run_dir={tmp_path}")
    first = fedtan_hpc.run(config)
    assert fedtan_hpc.run(config) == first
    told = capsys.readouterr().out
    assert "this run is finished" in told
    own = f"{100 * (first.clients_own_mix_accuracy_mean or 0):.2f} ± "
    assert told.count(f"│ on each client's own data │ {own}") == 2
    assert "which is the" not in told  # there is one global model


def test_the_folder_of_a_run_does_not_tell_a_wrong_number_of_clients() -> None:
    config = imported("sites", "partition=natural")
    assert "natural-2steps-seed0" in run_dir.name(config).name
    config.partition.name = PartitionName.iid
    assert "iid-5clients-2steps-seed0" in run_dir.name(config).name


def test_the_target_gets_its_options_the_seed_and_the_root(tmp_path: Path) -> None:
    words = ["data.options.a=3", "seed=5", "data.root=/somewhere", "partition=iid"]
    trained(imported("with_arguments", *words), tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    sizes = {"cat": 14, "dog": 12}
    write_images(root / "split" / "train", sizes, 0)
    write_images(root / "split" / "test", {"cat": 5, "dog": 5}, 1)
    write_images(root / "single", sizes, 2)
    for k, client in enumerate(("north", "south", "west")):
        write_images(root / "clients" / client / "train", sizes, 3 + k)
    write_images(root / "clients" / "north" / "test", {"dog": 4}, 9)
    return root


@pytest.mark.parametrize(
    ("name", "train", "test"), [("split", 26, 10), ("single", 20, 6), ("clients", 78, 4)]
)
def test_folders_of_images(name: str, train: int, test: int, folders: Path, tmp_path: Path) -> None:
    words = ["data=folder", f"data.root={folders / name}", "data.image_size=10", "partition=iid"]
    config = composed(*words, "clients=3")
    dataset = datasets.load(config.data, 0)
    assert (len(dataset.train), len(dataset.test), dataset.shape) == (train, test, (3, 10, 10))
    trained(config, tmp_path)


def test_a_summary_says_how_inputs_were_made(folders: Path, tmp_path: Path) -> None:
    words = ["data=folder", f"data.root={folders / 'split'}", "partition=iid", "clients=2"]
    words += ["data.image_size=10", "data.resize=12"]
    summary = trained(composed(*words), tmp_path)
    assert summary.data["class_names"] == ["cat", "dog"]
    assert (summary.data["shape"], summary.data["classes"]) == ([3, 10, 10], 2)
    mean, deviation = (np.array(summary.data["normalisation"][k]) for k in ("mean", "deviation"))
    dataset = datasets.load(composed(*words, "data.normalisation=none").data, 0)
    assert dataset.begin_reading is not None
    dataset.begin_reading()
    pixels = 255 * dataset.take(dataset.train).inputs.double().transpose(0, 1).flatten(1).numpy()
    assert mean == pytest.approx(pixels.mean(1), rel=1e-5)
    assert deviation == pytest.approx(pixels.std(1), rel=1e-5)


def test_a_folder_for_each_client_is_the_natural_partition(folders: Path, tmp_path: Path) -> None:
    config = composed("data=folder", f"data.root={folders / 'clients'}", "data.image_size=10")
    dataset = datasets.load(config.data, 0)
    assert [len(each) for each in dataset.clients or []] == [26, 26, 26]
    words = [f"data.root={folders / 'clients'}", "data.image_size=10", "partition=natural"]
    assert trained(composed("data=folder", *words), tmp_path).clients_judged == 1


MISTAKES = [
    (["data.target=no_such_module:data"], "data.target=no_such_module:data: allowed is package."),
    ([f"data.target={HERE}:nothing"], "it returned a NoneType"),
    ([f"data.target={HERE}:pair", "data.options.x=1"], "unexpected keyword argument 'x'"),
    ([f"data.target={HERE}:pair", "partition=natural"], "because the data name no clients"),
    ([f"data.target={HERE}:sites", "partition=natural", "clients=7"], "clients=7: allowed is"),
    (
        [f"data.target={HERE}:sites", "partition=natural", "clients_per_round=4"],
        "clients_per_round=4: allowed is 1 to the number of clients in the data, 3",
    ),
    ([f"data.target={HERE}:pair", "clients=46", "partition=iid"], "clients=46: allowed is 45 at"),
    ([f"data.target={HERE}:pair", "data.options.kind=dict"], "model.name=cnn: allowed is mlp or"),
    ([f"data.target={HERE}:pair", "data.train_samples=91"], "data.train_samples=91: allowed is 1"),
    ([f"data.target={HERE}:pair", "data.crop_padding=10"], "data.crop_padding=10: allowed is few"),
    ([f"data.target={HERE}:pair", "data.transform=no:such"], "data.transform=no:such: allowed is"),
    (
        [f"data.target={HERE}:faulty", "data.options.fault=target"],
        "the target of sample 7 of train is -1",
    ),
    ([f"data.target={HERE}:faulty", "data.options.fault=single"], "sample 7 of train is a ndarray"),
    ([f"data.target={HERE}:relabelled", "data.options.declared=false"], "targets lists 0"),
    ([f"data.target={HERE}:other_classes"], "same attribute classes; some have ['cat', 'dog', 'o"),
    ([f"data.target={HERE}:deep"], "the image has more than 8 bits (mode I;16)"),
    ([f"data.target={HERE}:of_two_classes"], "the target of sample 2 of train is 2"),
    ([f"data.target={HERE}:with_an_empty_client"], "client 1 has no samples"),
    (
        [f"data.target={HERE}:with_an_empty_client", "data.options.few=1", "partition=natural"],
        "because client 1 has 1 training samples; give each client 2 or more",
    ),
    ([f"data.target={HERE}:sharing_tests"], "is given twice to clients"),
    ([f"data.target={HERE}:pair", "data.train_samples=0"], "data.train_samples=0: allowed is a"),
    (
        [f"data.target={HERE}:faulty", "data.options={fault: infinite, kind: array, bad: -1}"],
        "the input has a value that is not finite",
    ),
    (
        [f"data.target={HERE}:in_file", "data.options.folder=.", "data.image_size=4"],
        "sample 0 of train: a transform raised ",
    ),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES)
def test_mistakes_are_one_line_before_training(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = composed("data=import", *words)
    assert expected in mistake_of(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


FAULTS = [
    ("shape", "bytes", "sample 7 of train: the input is an image [3, 5, 10] uint8, and the first"),
    ("infinite", "array", "sample 7 of train: the input has a value that is not finite"),
    ("text", "bytes", "sample 7 of train: the input has a str: allowed are tensors, arrays"),
]


@pytest.mark.parametrize("loading", ["device", "stream"])
@pytest.mark.parametrize(("fault", "kind", "expected"), FAULTS)
def test_a_bad_sample_is_named(
    fault: str, kind: str, expected: str, loading: str, tmp_path: Path
) -> None:
    words = [f"data.options={{fault: {fault}, kind: {kind}}}", f"data.loading={loading}"]
    words += ["data.normalisation=imagenet", "partition=iid", "clients=2", "local_steps=9"]
    words += [] if loading == "device" else ["data.workers=1"]
    message = mistake_of(imported("faulty", *words), tmp_path, RunError)
    assert message.startswith("rank 0, round ")
    assert expected in message


def test_a_damaged_image_is_named_by_its_file(folders: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_images(root / "train", {"a": 6, "b": 6}, 0)
    write_images(root / "test", {"a": 2, "b": 2}, 1)
    bad = root / "train" / "b" / "3.png"
    bad.write_bytes(bad.read_bytes()[:90])
    words = ["data=folder", f"data.root={root}", "data.image_size=8", "clients=2"]
    message = mistake_of(composed(*words), tmp_path / "run")
    assert f"{bad} cannot be read: " in message


def test_a_transform_keeps_the_kind_of_input(tmp_path: Path) -> None:
    words = [f"data.transform={HERE}:made_float", "partition=iid", "data.loading=stream"]
    message = mistake_of(imported("pair", *words, "data.workers=0"), tmp_path, RunError)
    assert "the input is [3, 12, 10] float32, and the first is an image [3, 12, 10]" in message


def test_clients_share_no_sample() -> None:
    config = DataConfig(name="import", target=f"{HERE}:overlapping")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="training sample 5 is given twice to clients"):
        load_own(config, 0)
