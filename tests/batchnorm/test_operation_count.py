"""How many tensor operations a synchronised step adds to a local one.

Each takes some microseconds, whatever the size of its tensors: on a GPU it is a launch or a few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedtan_hpc import convert_batchnorm, federated_statistics
from fedtan_hpc.batchnorm.conversion import batchnorm_layers
from fedtan_hpc.config.schema import ModelConfig
from fedtan_hpc.models import factory

MOST = 17
"""Operations that a BN layer adds, forward and backward; 16.2 are counted with torch 2.13."""
VIEWS = {"view", "expand", "slice", "select", "unsqueeze", "squeeze", "t", "detach", "alias"}
VIEWS |= {"split", "unbind", "as_strided", "transpose", "permute", "_unsafe_view"}


class Operations(TorchDispatchMode):
    """Counts all operations but views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, _: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        self.names[name] += name not in VIEWS
        return function(*arguments, **(options or {}))


def counted(step: Callable[[], None]) -> Counter[str]:
    step()  # constants are made once
    operations = Operations()
    with operations:
        step()
    return operations.names


def test_a_synchronised_step_adds_few_operations_per_layer() -> None:
    config = ModelConfig(name="resnet20")
    model = convert_batchnorm(factory.build(config, (3, 32, 32), classes=10, seed=0))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.tensor([0, 1])

    def local() -> None:
        nn.functional.cross_entropy(model(inputs), labels).backward()

    def synchronised() -> None:
        with federated_statistics(model, weight=1.0):
            local()

    synchronised()
    added = counted(synchronised)
    added.subtract(counted(local))
    assert added.total() <= MOST * len(batchnorm_layers(model)), added
