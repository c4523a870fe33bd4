"""Networks that people use, with random weights: a synchronised step is that of the pooled network.

Each network takes one step on two ranks, with batches of three samples and of one, in float64.
"""

import copy
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from fedtan_hpc import FedTANBatchNorm, convert_batchnorm, federated_statistics
from fedtan_hpc.runtime.torchvision_import import import_torchvision
from tests.helpers.ranks import on_ranks

pytestmark = pytest.mark.slow

SIZES = (3, 1)
TORCHVISION = [
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
]
TIMM = [
    "densenet121",
    "dla34",
    "dpn68",
    "efficientnet_lite0",
    "ese_vovnet19b_slim",
    "ghostnet_050",
    "hardcorenas_a",
    "hrnet_w18_small",
    "lcnet_050",
    "levit_128s",
    "mobilenetv3_small_050",
    "regnetx_002",
    "repvgg_a0",
    "resnet26d",
    "rexnet_100",
    "tinynet_e",
]
HUGGING_FACE = ["MobileNetV1", "MobileNetV2", "RegNet", "ResNet"]


class UNet(nn.Module):
    """Two levels, with BN in each block; the scores are the means of its map."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = block(3, 8), block(8, 16)
        self.up, self.head = block(24, 8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        coarse = self.bottom(nn.functional.max_pool2d(fine, 2))
        both = torch.cat([fine, interpolate(coarse, scale_factor=2)], 1)
        scores: Tensor = self.head(self.up(both)).mean((2, 3))
        return scores


def block(inputs: int, outputs: int) -> nn.Module:
    first = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    return nn.Sequential(*first, nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs))


def torchvision_network(name: str) -> nn.Module:
    options: dict[str, Any] = {"inception_v3": {"aux_logits": False, "init_weights": False}}
    create = import_torchvision().models.get_model
    model: nn.Module = create(name, num_classes=5, **options.get(name, {}))
    return model


def timm_network(name: str) -> nn.Module:
    import_torchvision()
    timm = importlib.import_module("timm")
    sizes = {"img_size": 64} if name == "levit_128s" else {}
    model: nn.Module = timm.create_model(name, num_classes=5, **sizes)
    return model


def hugging_face_network(name: str) -> nn.Module:
    import_torchvision()
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{name}Config")(num_labels=5)
    model: nn.Module = getattr(transformers, f"{name}ForImageClassification")(config)
    return model


def unet(name: str) -> nn.Module:
    return UNet()


SOURCES: dict[str, tuple[str, Callable[[str], nn.Module], list[str]]] = {
    "torchvision": ("torchvision", torchvision_network, TORCHVISION),
    "timm": ("timm", timm_network, TIMM),
    "Hugging Face": ("transformers", hugging_face_network, HUGGING_FACE),
    "this project": ("torch", unet, ["U-Net"]),
}
CASES = [(source, name) for source, (_, _, names) in SOURCES.items() for name in names]


def network(source: str, name: str) -> nn.Module:
    """Without dropout and stochastic depth, which would draw otherwise for the pooled batch."""
    torch.manual_seed(0)
    model = SOURCES[source][1](name).double()
    for module in model.modules():
        for attribute in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model.train()


def scores_of(output: Any) -> Tensor:
    """The class scores among what networks return."""
    if isinstance(output, Tensor):
        return output
    scores: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return scores


def batch(side: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(sum(SIZES), 3, side, side, generator=rng, dtype=torch.float64)
    return x * torch.tensor([1, 1, 1, 3]).view(-1, 1, 1, 1) + 1, torch.arange(sum(SIZES))


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(scores_of(model(x)), y)


def side_of(name: str) -> int:
    return 96 if name == "inception_v3" else 64


def errors_on_this_rank(source: str, name: str) -> dict[str, float]:
    """The relative errors of sum_k p_k g_k and of the running statistics, the largest first."""
    rank, plain = dist.get_rank(), network(source, name)
    model = convert_batchnorm(copy.deepcopy(plain))
    assert any(isinstance(layer, FedTANBatchNorm) for layer in model.modules())
    weight, (x, y) = SIZES[rank] / sum(SIZES), batch(side_of(name))
    with federated_statistics(model, weight):
        loss(model, x.split(SIZES)[rank], y.split(SIZES)[rank]).backward()
    loss(plain, x, y).backward()
    errors = {}
    pooled = {key: value.grad for key, value in plain.named_parameters() if value.grad is not None}
    largest = max(float(value.abs().max()) for value in pooled.values())
    for key, expected in pooled.items():
        found = model.get_parameter(key).grad
        found = torch.zeros_like(expected) if found is None else found * weight
        dist.all_reduce(found)
        scale = max(float(expected.abs().max()), 1e-3 * largest)
        errors[key] = float((found - expected).abs().max()) / scale
    for key, expected in plain.named_buffers():
        if expected.is_floating_point():
            difference = (model.get_buffer(key) - expected).abs().max()
            errors[key] = float(difference / expected.abs().max().clamp_min(1e-3))
    return dict(sorted(errors.items(), key=lambda pair: -pair[1])[:3])


@pytest.mark.parametrize(("source", "name"), CASES, ids=str)
def test_a_synchronised_step_is_that_of_the_pooled_network(source: str, name: str) -> None:
    if importlib.util.find_spec(SOURCES[source][0]) is None:
        pytest.skip("needs timm and transformers: pip install -e '.[networks]'")
    for errors in on_ranks(2, errors_on_this_rank, source, name, seconds=110):
        assert max(errors.values()) <= 1e-10, errors
