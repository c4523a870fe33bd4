"""Every experiment composes to a valid job with the expected settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from bench import loaders
from fedtan_hpc import cli
from fedtan_hpc.config.enums import PartitionName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import Config, OptimizerConfig, to_dict
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import reports
from tests.helpers import commands
from tests.helpers.jobs import rounds_of

NAMES = sorted(path.stem for path in (commands.ROOT / "conf" / "experiment").glob("*.yaml"))

# Settings of the authors' code.
PAPER = {
    "model.gamma": "uniform",
    "optimizer.lr": "0.5",
    "optimizer.momentum": "0.9",
    "optimizer.weight_decay": "0.0001",
    "lr_schedule.milestones": "[6000, 8000]",
    "lr_schedule.gamma": "0.1",
    "clients": "5",
    "rounds": "10000",
    "local_steps": "5",
    "batch_size": "128",
    "sampling": "replacement",
    "eval_every": "100",
}
CIFAR10 = {
    "data.name": "cifar10",
    "data.flip": "True",
    "data.crop_padding": "4",
    "data.normalisation": "imagenet",
    "model.name": "resnet20",
}
SHARDS = {"partition.name": "shards"}
"""Two classes each: that is what shards are with five clients and ten classes."""
# What is not the default, all of it.
EXPECTED = {
    "paper_cifar10_iid": {**PAPER, **CIFAR10, "partition.name": "iid"},
    "paper_cifar10_noniid": {**PAPER, **CIFAR10, **SHARDS},
    "paper_mnist_noniid": {**PAPER, **SHARDS, "data.name": "mnist", "model.name": "mlp"},
    "fashion_shards": {
        **SHARDS,
        "data.name": "fashion_mnist",
        "model.name": "mlp",
        "clients": "5",
        "batch_size": "64",
        "optimizer.lr": "0.1",
        "optimizer.momentum": "0.0",
        "rounds": "500",
        "local_steps": "5",
        "eval_every": "10",
    },
    "digits_shards": {},
    "scanners": {
        "partition.name": "natural",
        "data.name": "folder",
        "data.root": "data/scanners",
        "rounds": "150",
        "lr_schedule.milestones": "[100]",
    },
    "quick": {"rounds": "10", "eval_every": "1"},
    "shapes": {
        "partition.name": "natural",
        "data.name": "import",
        "data.target": "fedtan_hpc.data.examples.shapes:shapes",
        "data.options.samples": "100",
        "data.options.shift": "0.5",
        "task.name": "segmentation",
        "model.name": "unet",
        "optimizer.momentum": "0.9",
        "lr_schedule.name": "cosine",
        "rounds": "40",
        "batch_size": "16",
        "eval_every": "5",
    },
    "tabular": {
        "partition.name": "natural",
        "data.name": "import",
        "data.target": "fedtan_hpc.data.examples.tabular:tabular",
        "lr_schedule.milestones": "[60]",
        "rounds": "100",
        "eval_every": "5",
    },
    "imagenet_resnet50": {
        "data.name": "folder",
        "data.root": "images",
        "data.loading": "stream",
        "data.image_size": "224",
        "data.resize": "256",
        "data.random_resized_crop": "True",
        "data.flip": "True",
        "data.normalisation": "imagenet",
        "model.source": "torchvision",
        "model.name": "resnet50",
        "partition.name": "dirichlet",
        "optimizer.lr": "0.025",
        "optimizer.momentum": "0.9",
        "optimizer.weight_decay": "0.0001",
        "lr_schedule.milestones": "[15000, 30000]",
        "lr_schedule.gamma": "0.1",
        "precision": "bfloat16",
        "clients": "8",
        "rounds": "45000",
        "local_steps": "5",
        "batch_size": "64",
        "eval_every": "500",
    },
}
NEEDED = {"imagenet_resnet50": ("data.root=images",)}
"""What the user must name."""


def composed(*words: str) -> Config:
    [config] = cli.compose(words)
    return config


def test_all_are_known_here() -> None:
    assert set(NAMES) == set(EXPECTED)


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_valid_and_has_its_settings(name: str) -> None:
    config = composed(f"experiment={name}", *NEEDED.get(name, ()))
    check(config)
    if config.partition.name is PartitionName.shards:
        assert config.partition.shard_classes(config.clients, config.data.info().classes) == 2
    default = dict(reports.flat(to_dict(Config())))
    assert dict(reports.flat(to_dict(config))) == {**default, **EXPECTED[name]}


@pytest.mark.slow
def test_a_large_network_trains_on_a_folder_of_photographs(tmp_path: Path) -> None:
    """The experiment's network, precision and stream on two ranks; images are small."""
    loaders.write_images(tmp_path / "images", 48)
    words = ["experiment=imagenet_resnet50", f"data.root={tmp_path / 'images'}", "clients=2"]
    words += ["data.image_size=64", "data.resize=72", "batch_size=2", "local_steps=1", "rounds=2"]
    words += ["eval_every=2", "data.workers=1", "eval_train_samples=4"]
    done = commands.run(
        *("torchrun", "--nproc-per-node", "2", "-m", "fedtan_hpc", *words, "run_dir=out"),
        cwd=tmp_path,
        seconds=110,
    )
    assert done.returncode == 0, done.stderr
    assert "data.loading=stream" in done.stdout
    last = rounds_of(tmp_path / "out")[-1]
    assert last["round"] == 2
    assert math.isfinite(last["test_loss"])


def test_the_command_line_wins() -> None:
    words = ("experiment=paper_cifar10_noniid", "partition=dirichlet", "partition.alpha=0.1")
    config = composed(*words, "rounds=3", "algorithm=fedavg")
    check(config)
    assert (config.partition.name, config.partition.alpha) == ("dirichlet", 0.1)
    assert (config.rounds, config.algorithm.name, config.clients) == (3, "fedavg", 5)
    quick = composed("optimizer.lr=0.3", "experiment=quick")
    assert quick == replace(composed("experiment=quick"), optimizer=OptimizerConfig(lr=0.3))


@pytest.mark.parametrize(
    ("word", "start"),
    [
        ("experiment=nothing", "experiment=nothing: allowed is digits_shards | "),
        ("experiment=", "experiment=: allowed is digits_shards | "),
        ("experiment=null", "experiment=null: allowed is "),
        ("experment=quick", "experment=quick: no such option; did you mean experiment?"),
    ],
)
def test_a_wrong_name_is_one_line_with_its_remedy(word: str, start: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.compose([word])
    [line] = caught.value.mistakes
    assert line.startswith(start)
    assert "; " in line
    assert "\n" not in line
