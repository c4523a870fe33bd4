"""Rounds on torch's meta device, whose values cannot be read, as a stand-in for a GPU.

Every read of a meta tensor fails, and so does every operation that mixes meta and CPU tensors; the
test watches copies to the device.  A round that passes never makes its host wait for a GPU.
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
from fedtan_hpc.distributed import collectives, model_average, process_group
from fedtan_hpc.job.setup import prepare
from fedtan_hpc.runtime import transfer
from fedtan_hpc.runtime.device import DevicePlacement
from fedtan_hpc.training import client_runners, local_step, memory_budget
from fedtan_hpc.training.local_step import RoundContext
from tests.helpers.rounds import iid_config, train_round

FAR = torch.device("meta")


class Reads:
    """Counts of the two values that a round may read from its device."""

    headers = 0
    weights = 0


class Watch(TorchDispatchMode):
    """Refuses copies between devices that do not go through ``transfer.send``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sending = False

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        if "copy" in str(operation):
            leaves = tree_leaves((args, result))
            devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
            assert len(devices) == 1 or self.sending, f"{operation} waits for the device"
        return result


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Replaces the two reads of a round by counts."""
    mode, original_send = Watch(), transfer.send

    def send(tensor: Tensor, device: torch.device) -> Tensor:
        mode.sending = True
        try:
            return original_send(tensor, device)
        finally:
            mode.sending = False

    def batch_statistics(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.size(1)), x.new_empty(x.size(1))

    def verify(statistics: GlobalStatistics) -> None:
        Reads.headers += bool(statistics._unverified)
        statistics._unverified.clear()

    def check_header(header: Tensor, group: process_group.Group) -> None:
        Reads.weights += 1

    fused_sgd = torch.optim.SGD

    def sgd_without_kernels(groups: Any, fused: bool, **options: Any) -> Any:
        return fused_sgd(groups, **options)

    for module in (transfer, model_average, augmentation, local_step):
        if hasattr(module, "send"):
            monkeypatch.setattr(module, "send", send)
    monkeypatch.setattr(collectives, "to_cpu", lambda message: message)
    monkeypatch.setattr(model_average, "_check_header", check_header)
    monkeypatch.setattr(GlobalStatistics, "_verify", verify)
    monkeypatch.setattr(memory_budget, "free_bytes", lambda *_: None)
    monkeypatch.setattr(client_runners, "is_on_gpu", lambda model: True)
    monkeypatch.setattr(torch.optim, "SGD", sgd_without_kernels)
    library = torch.library.Library("aten", "IMPL")
    library.impl("batch_norm_update_stats", batch_statistics, "Meta")
    yield mode
    library._destroy()


ALGORITHMS = ("fedtan", "fedavg", "fixbn", "silobn", "fbn", "hbn", "centralised")


@pytest.mark.parametrize(("clients", "batch_size"), [(1, 16), (3, 16), (3, 80)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_round_reads_values_only_in_its_checks(
    algorithm: str, clients: int, batch_size: int, watch: Watch
) -> None:
    """Cases: one client, three stacked clients, and three with padded batches; all augment."""
    options = iid_config(
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
        context = RoundContext(number, 0.05, plan(options, number))
        Reads.headers = Reads.weights = 0
        with watch:
            losses = train_round(trainer.cohort, hosted, context)
        assert all(loss.device == FAR for loss in losses)
        assert Reads.weights == 1
        assert Reads.headers == context.plan.synchronised_steps
