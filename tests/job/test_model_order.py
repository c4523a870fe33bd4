"""A job whose ranks build the model in another order, as from a Python set: equal rounds."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedtan_hpc.config.enums import ModelSource
from fedtan_hpc.config.schema import ModelConfig
from fedtan_hpc.job.setup import prepare
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU, distance, iid_config


class Parts(nn.Module):
    """Three parts of equal shapes, which are added in another order on rank 1."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        backwards = dist.get_rank() == 1 and os.environ.get("ORDER") == "by rank"
        names = ("c", "b", "a") if backwards else ("a", "b", "c")
        self.parts = nn.ModuleDict({name: part(inputs, classes) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = (self.parts[name](x.flatten(1)) for name in ("a", "b", "c"))
        result: Tensor = first + 2 * second + 3 * third
        return result


def part(inputs: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, classes))


def parts(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Parts(torch.Size(shape).numel(), classes)


def state_after_training(algorithm: str, order: str) -> dict[str, Tensor]:
    os.environ["ORDER"] = order
    target = ModelConfig(source=ModelSource.import_, target="tests.job.test_model_order:parts")
    options = iid_config(algorithm, model=target, clients=3)
    trainer = prepare(options, CPU)
    trainer.train([])
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg", "fedbn", "hbn", "centralised"])
def test_ranks_may_build_the_model_in_another_order(algorithm: str) -> None:
    expected, _ = on_ranks(2, state_after_training, algorithm, "alike")
    for state in on_ranks(2, state_after_training, algorithm, "by rank"):
        assert distance(state, expected) < 1e-12
