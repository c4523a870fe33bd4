"""The GPU, the backend and the precision of a rank, on machines that the tests describe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedtan_hpc.config.enums import BackendName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import CommConfig, Config
from fedtan_hpc.runtime import device
from fedtan_hpc.runtime.launcher_env import RankInfo
from tests.helpers import commands

TASKS = {"SLURM_STEP_NUM_TASKS": "4"}
MACHINES = {
    "one rank per GPU": (4, {}, "torchrun", ("cuda:3", "nccl", 1)),
    "two ranks per GPU": (2, {}, "torchrun", ("cuda:1", "gloo", 2)),
    "GPUs per task": (1, {**TASKS, "SLURM_GPUS_PER_TASK": "1"}, "srun", ("cuda:0", "nccl", 1)),
    "GPUs per task by TRES": (
        1,
        {**TASKS, "SLURM_TRES_PER_TASK": "cpu=2,gres/gpu:1"},
        "srun",
        ("cuda:0", "nccl", 1),
    ),
    "one task per GPU": (1, {**TASKS, "SLURM_NTASKS_PER_GPU": "1"}, "srun", ("cuda:0", "nccl", 1)),
    "two tasks per GPU": (1, {**TASKS, "SLURM_NTASKS_PER_GPU": "2"}, "srun", ("cuda:0", "gloo", 4)),
    "two ranks in one task": (
        2,
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_GPUS_PER_TASK": "2"},
        "torchrun",
        ("cuda:1", "gloo", 2),
    ),
}


def choose(
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    variables: dict[str, str],
    launcher: str = "torchrun",
    backend: BackendName = BackendName.auto,
) -> device.DevicePlacement:
    for name in ("SLURM_GPUS_PER_TASK", "SLURM_STEP_NUM_TASKS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    info = RankInfo(3, 4, 3, 4, launcher)
    return device.choose(Config(comm=CommConfig(backend=backend)), info)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_rank_uses_the_gpu_of_its_local_rank(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank is the last of four; NCCL cannot serve two ranks on one GPU."""
    gpus, variables, launcher, expected = MACHINES[machine]
    placement = choose(monkeypatch, gpus, variables, launcher)
    assert (str(placement.device), placement.backend, placement.ranks_per_device) == expected


def test_ranks_without_gpus_share_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = choose(monkeypatch, 0, {})
    assert (placement.device.type, placement.backend, placement.ranks_per_device) == (
        "cpu",
        "gloo",
        4,
    )


def test_nccl_is_refused_to_ranks_that_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="4 ranks share 2 GPUs"):
        choose(monkeypatch, 2, {}, backend=BackendName.nccl)


def test_nccl_is_accepted_where_a_script_chose_each_ranks_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All ranks may see one GPU, which only NCCL can tell."""
    visible = {"CUDA_VISIBLE_DEVICES": "3"}
    placement = choose(monkeypatch, 1, visible, backend=BackendName.nccl)
    assert (str(placement.device), placement.backend, placement.ranks_per_device) == (
        "cuda:0",
        "nccl",
        1,
    )
    assert choose(monkeypatch, 1, visible).backend == "gloo"


CHOICES = {
    "torch's default": "",
    "precision": "torch.set_float32_matmul_precision('medium')",
    "older": "torch.backends.cuda.matmul.allow_tf32 = True",
    "newer": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "newer, convolutions": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "newer, cuDNN": "torch.backends.cudnn.fp32_precision = 'ieee'",
    "newer, everywhere": "torch.backends.fp32_precision = 'tf32'",
}
PROBE = """
import torch
from fedtan_hpc.runtime.device import tensor_float

SETTINGS = torch.backends.cuda.matmul, torch.backends.cudnn.conv

def uses_tf32():
    return [setting.fp32_precision == "tf32" for setting in SETTINGS]

{choice}
before = uses_tf32()
for allowed in (True, False):
    with tensor_float(allowed):
        assert uses_tf32() == [allowed] * 2, uses_tf32()
assert uses_tf32() == before, uses_tf32()
"""


@pytest.mark.parametrize("choice", CHOICES)
def test_the_callers_choice_of_tensor_float_is_restored(choice: str, tmp_path: Path) -> None:
    """torch's older and newer settings exclude each other, so each case has its own process."""
    (tmp_path / "probe.py").write_text(PROBE.format(choice=CHOICES[choice]), encoding="utf-8")
    done = commands.run("python", "probe.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
