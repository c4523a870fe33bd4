"""Options: every YAML file composes, and every mistake is one line with its remedy."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedtan_hpc import cli
from fedtan_hpc.config import help, hydra_errors
from fedtan_hpc.config.enums import DeviceName, PartitionName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import Config, PartitionConfig, to_dict
from fedtan_hpc.config.submit_options import SubmitConfig
from fedtan_hpc.config.validate import check
from fedtan_hpc.runtime.launcher_env import RankInfo, detect

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted(
    path for path in CONF.rglob("*.yaml") if path.parent not in (CONF, CONF / "launch")
)
LAUNCHES = sorted(path.stem for path in (CONF / "launch").glob("*.yaml"))


def composed(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[Config]:
    monkeypatch.setattr(sys, "argv", ["fedtan_hpc", *overrides])
    return cli.compose()


def mistakes(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[str, ...]:
    """Returns the mistakes in the options that ``overrides`` compose."""
    with pytest.raises(ConfigError) as caught:
        check(composed(monkeypatch, *overrides)[0])
    return caught.value.mistakes


def test_the_default_is_config_py_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert composed(monkeypatch) == [Config()]
    check(Config())


@pytest.mark.parametrize("choice", LAUNCHES)
def test_every_way_to_submit_composes(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["submit", f"launch={choice}"])
    [config] = cli.compose_as(SubmitConfig, "submit")
    assert str(config.launch.cluster) == choice
    assert config.job() == Config()


def test_submission_begins_with_the_same_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["submit"])
    assert cli.compose_as(SubmitConfig, "submit") == [SubmitConfig()]


OWN_DATA = ["data=import", "data.target=my_data:hospitals", "partition=natural"]


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_choice_composes_to_valid_options(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, choice = path.parent.name, path.stem
    needed = {
        "model=import": ["model.target=my_networks:small"],
        "data=import": ["data.target=my_data:hospitals"],
        "data=folder": ["data.root=scans"],
        "task=import": ["task.target=my_tasks:Ranking"],
        **{f"task={name}": OWN_DATA for name in ("multilabel", "segmentation", "regression")},
        "partition=natural": ["data=folder", "data.root=scans"],
        "experiment=imagenet_resnet50": ["data.root=images"],
    }
    word = f"{group}={choice}"
    [config] = composed(monkeypatch, word, *needed.get(word, []))
    check(config)
    options = to_dict(config)
    if group == "model" and choice in ("import", "torchvision"):
        assert options["model"]["source"] == choice
    elif group != "experiment":
        assert options[group]["name"] == choice


def test_a_sweep_composes_every_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    configs = composed(monkeypatch, "-m", "seed=0,1", "algorithm=fedtan,fedavg")
    points = [(config.seed, str(config.algorithm.name)) for config in configs]
    assert points == [(0, "fedtan"), (0, "fedavg"), (1, "fedtan"), (1, "fedavg")]


def test_options_written_to_yaml_read_back_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ("model=import", "model.target=my_networks:small")
    words = ("data=synthetic", "data.shape=[3,8,8]", "optimizer.lr=1e-3", *network)
    [config] = composed(monkeypatch, *words)
    assert pickle.loads(pickle.dumps(config)) == config
    text = OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
    assert (
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text)))
        == config
    )


# One mistake each: the overrides, the option that the line names, and the value that it shows.
WRONG = [
    (["foo=1"], "foo", "1"),
    (["+foo=1"], "foo", "1"),
    (["optimizer.foo=1"], "optimizer.foo", "1"),
    (["+optimizer.foo=1"], "optimizer.foo", "1"),
    (["optimzer.lr=1"], "optimzer.lr", "1"),
    (["algorithm=fedprox"], "algorithm", "fedprox"),
    (["algorithm.name=fedprox"], "algorithm.name", "fedprox"),
    (["data=imagenet"], "data", "imagenet"),
    (["model=resnet"], "model", "resnet"),
    (["partition="], "partition", ""),
    (["rounds=abc"], "rounds", "abc"),
    (["rounds=1.5"], "rounds", "1.5"),
    (["rounds=null"], "rounds", "null"),
    (["rounds"], "rounds", None),
    (["rounds=[1,"], "rounds", None),
    (["--bogus"], "--bogus", None),
    (["rounds=0"], "rounds", "0"),
    (["clients=0"], "clients", "0"),
    (["clients=-3"], "clients", "-3"),
    (["clients=1000"], "clients", "1000"),
    (["clients_per_round=0"], "clients_per_round", "0"),
    (["clients_per_round=6"], "clients_per_round", "6"),
    (["participation=weighted"], "participation", "weighted"),
    (["participation=fair"], "participation", "fair"),
    (["precision=float16"], "precision", "float16"),
    (["cohort.mode=parallel"], "cohort.mode", "parallel"),
    (["cohort.max_stacked=0"], "cohort.max_stacked", "0"),
    (["local_steps=0"], "local_steps", "0"),
    (["batch_size=0"], "batch_size", "0"),
    (["seed=-1"], "seed", "-1"),
    (["eval_every=0"], "eval_every", "0"),
    (["check_every=0"], "check_every", "0"),
    (["threads=0"], "threads", "0"),
    (["device=tpu"], "device", "tpu"),
    (["comm.backend=mpich"], "comm.backend", "mpich"),
    (["comm.backend=nccl", "device=cpu"], "comm.backend", "nccl"),
    (["tf32=true", "device=cpu"], "tf32", "true"),
    (["tf32=true", "precision=bfloat16"], "tf32", "true"),
    (["comm.timeout_seconds=-1"], "comm.timeout_seconds", "-1.0"),
    (["optimizer.lr=0"], "optimizer.lr", "0.0"),
    (["optimizer.lr=nan"], "optimizer.lr", "nan"),
    (["optimizer.lr=${oops}"], "optimizer.lr", "${oops}"),
    (["optimizer.momentum=1"], "optimizer.momentum", "1.0"),
    (["optimizer.weight_decay=-0.1"], "optimizer.weight_decay", "-0.1"),
    (["client=adam"], "client", "adam"),
    (["lr_schedule.milestones=5"], "lr_schedule.milestones", "5"),
    (["lr_schedule.milestones=[80,60]"], "lr_schedule.milestones", "[80, 60]"),
    (["lr_schedule.milestones=[0]"], "lr_schedule.milestones", "[0]"),
    (["lr_schedule.gamma=inf"], "lr_schedule.gamma", "inf"),
    (["data.samples=100"], "data.samples", "100"),
    (["data=synthetic", "data.samples=99"], "data.samples", "99"),
    (["data=synthetic", "data.shape=[3,32]"], "data.shape", "[3, 32]"),
    (["data=synthetic", "data.shape=[3,a,32]"], "data.shape", "[3,a,32]"),
    (["data=synthetic", "data.shape=[3,2,2]", "model=cnn"], "data.shape", "[3, 2, 2]"),
    (["data=synthetic", "data.shape=[3,8,3]", "model=vgg11_bn"], "data.shape", "[3, 8, 3]"),
    (["model.name=resnet18"], "model.name", "resnet18"),
    (["model.name=timm"], "model.name", "timm"),
    (["model.source=timm"], "model.source", "timm"),
    (["model.source=target"], "model.source", "target"),
    (["model.norm=batch"], "model.norm", "batch"),
    (["model.gamma=2"], "model.gamma", "2"),
    (["model.small_input=true"], "model.small_input", "true"),
    (["model.target=my:net"], "model.target", "my:net"),
    (["model=import"], "model.target", "null"),
    (["model=import", "model.target=my.net"], "model.target", "my.net"),
    (["model=import", "model.target=my:"], "model.target", "my:"),
    (["data=synthetic", "data.classes=1"], "data.classes", "1"),
    (["partition.classes_per_client=11"], "partition.classes_per_client", "11"),
    (["partition.classes_per_client=0"], "partition.classes_per_client", "0"),
    (["partition.classes_per_client=1"], "partition.classes_per_client", "1"),
    (["partition.alpha=1"], "partition.alpha", "1.0"),
    (["partition=dirichlet", "partition.alpha=0"], "partition.alpha", "0.0"),
    (["partition=iid", "partition.classes_per_client=2"], "partition.classes_per_client", "2"),
    (["data=null"], "data", "null"),
    (["seed=5000000000"], "seed", "5000000000"),
    (["comm.timeout_seconds=1e300"], "comm.timeout_seconds", "1e+300"),
    (["lr_schedule.gamma=1e300"], "lr_schedule.gamma", "1e+300"),
    (["partition=dirichlet", "partition.alpha=1e308"], "partition.alpha", "1e+308"),
    (["data=synthetic", "data.samples=0"], "data.samples", "0"),
    (["data=synthetic", "data.shape=[]"], "data.shape", "[]"),
    (["data=synthetic", "data.classes=0"], "data.classes", "0"),
    (["data=synthetic", "data.shape=[3,100000,100000]"], "data.shape", "[3, 100000, 100000]"),
    (["run_dir="], "run_dir", ""),
    (["algorithm=fedavg", "algorithm.synchronised_steps=1"], "algorithm.synchronised_steps", "1"),
    (["algorithm.synchronised_steps=6"], "algorithm.synchronised_steps", "6"),
    (["algorithm.synchronised_steps=-1"], "algorithm.synchronised_steps", "-1"),
    (["algorithm.synchronise_every=0"], "algorithm.synchronise_every", "0"),
    (["algorithm=fedbn", "algorithm.synchronise_every=2"], "algorithm.synchronise_every", "2"),
    (["algorithm.switch_round=5"], "algorithm.switch_round", "5"),
    (["algorithm=fixbn", "algorithm.switch_round=0"], "algorithm.switch_round", "0"),
    (["algorithm.groups=2"], "algorithm.groups", "2"),
    (["algorithm=fedavg_ln", "algorithm.groups=2"], "algorithm.groups", "2"),
    (["algorithm=fedavg_gn", "algorithm.groups=0"], "algorithm.groups", "0"),
    (["model.norm=gn"], "model.norm", "gn"),
    (["algorithm=fedbn", "model.norm=none"], "model.norm", "none"),
    (["algorithm=hbn", "cohort.mode=stacked"], "cohort.mode", "stacked"),
    (["client.proximal_mu=-1"], "client.proximal_mu", "-1.0"),
    (["server.optimizer=sgd"], "server.optimizer", "sgd"),
    (["server.lr=1"], "server.lr", "1.0"),
    (["server.momentum=0.5"], "server.momentum", "0.5"),
    (["server.optimizer=momentum", "server.tau=1"], "server.tau", "1.0"),
    (["algorithm=fixbn", "algorithm.switch_round=1"], "algorithm.switch_round", "1"),
    (["model.norm=none", "model.gamma=uniform", "algorithm=fedavg"], "model.gamma", "uniform"),
    (["momentum=0.9"], "momentum", "0.9"),
    (["server.optimizer=adam", "server.lr=0"], "server.lr", "0.0"),
    (["server.optimizer=adam", "server.beta2=1"], "server.beta2", "1.0"),
    (["server.optimizer=momentum", "server.momentum=-0.1"], "server.momentum", "-0.1"),
    (["server.optimizer=yogi", "server.tau=0"], "server.tau", "0.0"),
    (["eval_train_samples=-1"], "eval_train_samples", "-1"),
    (["eval_clients=0"], "eval_clients", "0"),
    (["algorithm=singleset", "server.optimizer=adam"], "server.optimizer", "adam"),
    (["algorithm=fixbn", "algorithm.switch_round=101"], "algorithm.switch_round", "101"),
    (["data.root=files"], "data.root", "files"),
    (["data=mnist", "data.root="], "data.root", ""),
    (["data.train_samples=9"], "data.train_samples", "9"),
    (["data.train_samples=1438"], "data.train_samples", "1438"),
    (["data=cifar100", "data.test_samples=99"], "data.test_samples", "99"),
    (["data=synthetic", "data.test_samples=2001"], "data.test_samples", "2001"),
    (["data.train_samples=20", "clients=11"], "clients", "11"),
    (["data=mnist", "data.shape=[1,28,28]"], "data.shape", "[1, 28, 28]"),
    (["data=mnist", "data.normalisation=imagenet"], "data.normalisation", "imagenet"),
    (["data=synthetic", "data.normalisation=imagenet"], "data.normalisation", "imagenet"),
    (["data.normalisation=none"], "data.normalisation", "none"),
    (["data.crop_padding=-1"], "data.crop_padding", "-1"),
    (["data.crop_padding=8"], "data.crop_padding", "8"),
    (["data.flip=maybe"], "data.flip", "maybe"),
    (["sampling=random"], "sampling", "random"),
    (["partition=quantity", "partition.alpha=-1"], "partition.alpha", "-1.0"),
    (["partition=feature_shift", "partition.alpha=1"], "partition.alpha", "1.0"),
    (["partition=iid", "partition.shift=rotation"], "partition.shift", "rotation"),
    (["partition.strength=2"], "partition.strength", "2.0"),
    (["partition=feature_shift", "partition.shift=blur"], "partition.shift", "blur"),
    (["partition=feature_shift", "partition.strength=0"], "partition.strength", "0.0"),
    (["partition=feature_shift", "partition.strength=181"], "partition.strength", "181.0"),
    (
        ["partition=feature_shift", "partition.shift=intensity", "partition.strength=0.5"],
        "partition.strength",
        "0.5",
    ),
    (["seed=0,1"], "seed", None),
    (["-m", "seed=0,x"], "seed", "0,x"),
]


@pytest.mark.parametrize(("overrides", "option", "value"), WRONG, ids=lambda v: str(v))
def test_a_wrong_option_is_one_line_with_its_remedy(
    overrides: list[str],
    option: str,
    value: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    [line] = mistakes(monkeypatch, *overrides)
    assert "\n" not in line
    assert option in line
    if value is not None:
        assert line.startswith(f"{option}={value}: ")
        assert "; " in line


def test_all_mistakes_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = mistakes(monkeypatch, "rounds=0", "optimizer.lr=-1", "batch_size=0")
    assert [line.partition("=")[0] for line in lines] == ["rounds", "batch_size", "optimizer.lr"]


def test_ranks_are_read_from_torchrun() -> None:
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert detect(variables) == RankInfo(3, 4, 1, 2, "torchrun", nodes=2)
    assert detect({}) == RankInfo(0, 1, 0, 1, "none")


SRUN = {
    "SLURM_PROCID": "4",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


def test_ranks_are_read_from_srun() -> None:
    assert detect(SRUN) == RankInfo(4, 5, 0, 1, "srun", nodes=3)
    second = {**SRUN, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
    assert detect(second) == RankInfo(3, 5, 1, 2, "srun", nodes=3)


def test_the_launcher_nearest_to_the_ranks_is_asked() -> None:
    """torchrun and mpirun may run inside a SLURM allocation, and srun may set PMI variables."""
    torchrun = {"RANK": "0", "WORLD_SIZE": "2"}
    mpirun = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert detect({**SRUN, **torchrun}).launcher == "torchrun"
    assert detect({**SRUN, **mpirun}).launcher == "MPICH"
    assert detect({**SRUN, "PMI_RANK": "4", "PMI_SIZE": "5"}).launcher == "srun"
    in_the_batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    assert detect(in_the_batch_script).launcher == "none"


def test_what_types_admit_is_told_in_words() -> None:
    assert help.allowed("device") == "auto | cpu | cuda"
    assert help.allowed("check_every") == "a whole number or null"
    assert "list of whole numbers" in help.allowed("data.shape")
    assert "run_dir" in [entry.option for entry in help.entries()]


class Left(BaseException):
    """Raised in place of the end of the process."""


def leave(code: int) -> None:
    raise Left(code)


def most_are_slow() -> Iterator[Any]:
    """All wrong options; one in twelve is tried by default."""
    for number, (overrides, *_) in enumerate(WRONG):
        marks = pytest.mark.slow if number % 12 else ()
        yield pytest.param(overrides, id=str(overrides), marks=marks)


@pytest.mark.parametrize("overrides", list(most_are_slow()))
def test_rank_0_alone_speaks_and_exits_with_2(
    overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedtan_hpc", *overrides])
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left) as left:
        cli.main()
    assert left.value.args == (2,)
    assert len(capsys.readouterr().err.splitlines()) == 1
    for name, text in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(time, "sleep", leave)
    with pytest.raises(Left) as waiting:
        cli.main()
    assert waiting.value.args[0] >= 10  # seconds that rank 0 has to speak
    assert capsys.readouterr().err == ""


def test_points_of_a_sweep_may_not_share_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedtan_hpc", "-m", "seed=0,1", "run_dir=same"])
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left):
        cli.main()
    assert "run_dir=same" in capsys.readouterr().err
    assert not (tmp_path / "same").exists()


def test_values_from_python_are_taken_as_from_the_command_line() -> None:
    given = Config(partition=PartitionConfig(name="shards"), device="cpu", rounds=7)  # type: ignore[arg-type]
    config = hydra_errors.typed(given)
    assert config.partition.name is PartitionName.shards
    assert config.device is DeviceName.cpu


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"partition": PartitionConfig(name="stripes")}, "partition.name=stripes: "),  # type: ignore[arg-type]
        ({"rounds": 2.5}, "rounds=2.5: "),
        ({"rounds": "many"}, "rounds=many: "),
        ({"device": "tpu"}, "device=tpu: "),
    ],
)
def test_wrong_values_from_python_are_mistakes_too(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hydra_errors.typed(Config(**wrong))
    assert str(caught.value).startswith(line)


def test_ranks_that_are_no_numbers_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"^RANK=x: "):
        detect({"RANK": "x", "WORLD_SIZE": "2"})
