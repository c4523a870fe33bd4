"""Rounds on a device whose values cannot be read, torch's meta, in place of a GPU.

There every read fails, as does every operation that mixes its tensors with the CPU's; copies to it
are watched.  What is left is work that a host can hand to a GPU without waiting for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedtan_hpc.batchnorm.statistics_call import GlobalStatistics
from fedtan_hpc.config.algorithms import plan
from fedtan_hpc.config.enums import PrecisionName
from fedtan_hpc.config.schema import DataConfig, OptimizerConfig
from fedtan_hpc.data import augmentation
from fedtan_hpc.distributed import collectives, model_average
from fedtan_hpc.job.setup import prepare
from fedtan_hpc.runtime import transfer
from fedtan_hpc.runtime.device import DevicePlacement
from fedtan_hpc.training import cohort, local_training, memory_budget, sgd
from fedtan_hpc.training.local_training import RoundContext
from tests.training.test_compile_step import config

FAR = torch.device("meta")


class Reads:
    """What a round may read of its device's values: how often, and nothing else."""

    headers = 0
    weights = 0


class Watch(TorchDispatchMode):
    """Refuses copies between devices that are not sent."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sending = False

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        if "copy" in str(operation):
            found = tree_leaves((args, result))
            kinds = {each.device.type for each in found if isinstance(each, Tensor)}
            assert len(kinds) == 1 or self.sending, f"{operation} waits for the device"
        return result


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """The two reads of a round are counted in place of being done."""
    found, sent = Watch(), transfer.send

    def send(tensor: Tensor, device: torch.device) -> Tensor:
        found.sending = True
        try:
            return sent(tensor, device)
        finally:
            found.sending = False

    def statistics(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.size(1)), x.new_empty(x.size(1))

    def verify(federation: GlobalStatistics) -> None:
        Reads.headers += bool(federation._unverified)
        federation._unverified.clear()

    def check_weights(header: Tensor, ranks: int) -> None:
        Reads.weights += 1

    def sgd_without_kernels(values: Any, rate: float, momentum: float, decay: float) -> Any:
        return torch.optim.SGD(values, lr=rate, momentum=momentum, weight_decay=decay)

    for module in (transfer, model_average, augmentation, local_training):
        if hasattr(module, "send"):
            monkeypatch.setattr(module, "send", send)
    monkeypatch.setattr(collectives, "to_cpu", lambda message: message)
    monkeypatch.setattr(model_average, "_check_weights", check_weights)
    monkeypatch.setattr(GlobalStatistics, "_verify", verify)
    monkeypatch.setattr(memory_budget, "free_bytes", lambda *_: None)
    monkeypatch.setattr(cohort.Cohort, "_on_gpu", True)
    monkeypatch.setattr(sgd, "sgd", sgd_without_kernels)
    library = torch.library.Library("aten", "IMPL")
    library.impl("batch_norm_update_stats", statistics, "Meta")
    yield found
    library._destroy()


ALGORITHMS = ("fedtan", "fedavg", "fixbn", "silobn", "fbn", "hbn", "centralised")


@pytest.mark.parametrize(("clients", "batch_size"), [(1, 16), (3, 16), (3, 80)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_round_reads_no_value_but_in_its_checks(
    algorithm: str, clients: int, batch_size: int, watch: Watch
) -> None:
    """One client, three that are stacked, and three whose batches are padded; augmented images."""
    options = config(
        algorithm,
        clients=clients,
        local_steps=3,
        batch_size=batch_size,
        precision=PrecisionName.float32,
        optimizer=OptimizerConfig(lr=0.05, momentum=0.9),
        data=DataConfig(train_samples=200, test_samples=50, flip=True, crop_padding=1),
    )
    trainer = prepare(options, DevicePlacement(FAR, "gloo"))
    hosted = trainer._hosted(trainer._participants(1))
    for number in (1, 2):
        now = RoundContext(number, 0.05, plan(options, number))
        Reads.headers = Reads.weights = 0
        with watch:
            losses = trainer.cohort.train(hosted, now)
        assert all(loss.device == FAR for loss in losses)
        assert Reads.weights == 1
        assert Reads.headers == now.plan.synchronised_steps
