"""Networks: sizes, seeds, and torchvision's networks adapted to the data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedtan_hpc.config.enums import GammaName, ModelName, ModelSource
from fedtan_hpc.config.schema import ModelConfig
from fedtan_hpc.models import factory

CONVOLUTIONAL = sorted(set(ModelName) - {ModelName.mlp, ModelName.unet})
SHAPE = (3, 32, 32)


def build(name: str, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> nn.Module:
    return factory.build(ModelConfig(name=name), shape, 10, seed)


def zoo(
    name: str, shape: tuple[int, ...] = SHAPE, small_input: bool = False, device: str = "meta"
) -> nn.Module:
    """Returns torchvision's network; on meta it needs no memory and no time for weights."""
    options = ModelConfig(source=ModelSource.torchvision, name=name, small_input=small_input)
    with torch.device(device):
        return factory.build(options, shape, 10, seed=0)


def layers(module: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[str]:
    """Returns the paths of the layers of a type."""
    return [path for path, layer in module.named_modules() if isinstance(layer, kind)]


def same(one: nn.Module, other: nn.Module) -> bool:
    values = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in values)


@pytest.mark.parametrize(
    ("name", "parameters", "norms", "channels"),
    [
        ("resnet20", 269_722, 19, 688),
        ("resnet32", 464_154, 31, 1_136),
        ("resnet56", 853_018, 55, 2_032),
        ("vgg11_bn", 9_228_362, 8, 2_752),
    ],
)
def test_networks_have_the_sizes_of_the_literature(
    name: str, parameters: int, norms: int, channels: int
) -> None:
    with torch.device("meta"):
        module = build(name)
    widths = [layer.num_features for layer in module.modules() if isinstance(layer, _BatchNorm)]
    assert factory.parameter_count(module) == parameters
    assert (len(widths), sum(widths)) == (norms, channels)


@pytest.mark.parametrize("shape", [(1, 28, 28), SHAPE, (1, 8, 8), (2, 4, 5)])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_networks_take_images_of_4_pixels_and_more(name: str, shape: tuple[int, ...]) -> None:
    assert build(name, shape)(torch.zeros(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "path", "first"),
    [
        ("mlp", "1.weight", [-0.000195, -0.012676, -0.020205]),
        ("cnn", "0.weight", [-0.374163, 0.209239, 0.144408]),
        ("resnet20", "conv.weight", [-0.255603, -0.107999, 0.081582]),
    ],
)
def test_initial_weights_stay_what_published_results_began_with(
    name: str, path: str, first: list[float]
) -> None:
    weight = build(name).state_dict()[path]
    torch.testing.assert_close(weight.flatten()[:3], torch.tensor(first), atol=2e-6, rtol=0)


def own_network(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))


OWN = ModelConfig(source=ModelSource.import_, target=f"{__name__}:own_network")
UNIFORM = ModelConfig(name="cnn", gamma=GammaName.uniform)
SHUFFLE = ModelConfig(source=ModelSource.torchvision, name="shufflenet_v2_x0_5")


@pytest.mark.parametrize("options", [ModelConfig(), UNIFORM, OWN, SHUFFLE], ids=str)
def test_the_seed_alone_decides_the_weights(options: ModelConfig) -> None:
    before = torch.get_rng_state()
    one, other, third = (factory.build(options, SHAPE, 10, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, other)
    assert not same(one, third)


def test_scales_can_be_drawn_without_changing_other_weights() -> None:
    drawn, ones = factory.build(UNIFORM, SHAPE, 10, 0).state_dict(), build("cnn").state_dict()
    for path in layers(build("cnn"), _BatchNorm):
        scale, offset = drawn.pop(f"{path}.weight"), drawn.pop(f"{path}.bias")
        assert scale.min() > 0
        assert scale.max() < 1
        assert scale.std() > 0.2
        assert not offset.any()
    assert all(torch.equal(value, ones[name]) for name, value in drawn.items())


# torchvision


def test_torchvision_networks_fit_the_classes_and_channels() -> None:
    assert factory.parameter_count(zoo("resnet18")) == 11_689_512 - 990 * 513
    assert factory.parameter_count(zoo("resnet18", (1, 28, 28))) == 11_689_512 - 990 * 513 - 6_272
    for name in ("resnet18", "mobilenet_v2", "densenet121", "squeezenet1_1", "convnext_tiny"):
        module = zoo(name, (1, 64, 64))
        assert module(torch.zeros(2, 1, 64, 64, device="meta")).shape == (2, 10)


def test_torchvision_keeps_its_own_initial_weights_but_for_a_new_first_layer() -> None:
    plain, grey = zoo("resnet18", device="cpu"), zoo("resnet18", (1, 32, 32), device="cpu")
    ours, changed = plain.state_dict(), grey.state_dict()
    deviation = (2 / (64 * 7 * 7)) ** 0.5
    for weight in (ours.pop("conv1.weight"), changed.pop("conv1.weight")):
        assert weight.std().item() == pytest.approx(deviation, rel=0.1)
    assert all(torch.equal(value, changed[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("name", "last", "large", "small"),
    [
        ("resnet18", "layer4", 1, 4),
        ("shufflenet_v2_x0_5", "conv5", 1, 4),
        ("mobilenet_v2", "features", 1, 2),
        ("squeezenet1_0", "features", 1, 8),
    ],
)
def test_small_input_keeps_the_size_of_the_image(
    name: str, last: str, large: int, small: int
) -> None:
    assert pixels(zoo(name), last) == large
    module = zoo(name, small_input=True)
    assert pixels(module, last) == small
    first = next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
    assert first.kernel_size == (3, 3)
    assert first.stride == (1, 1)


def pixels(module: nn.Module, path: str) -> int:
    """Returns the height of a layer's output for samples of ``SHAPE``."""
    seen: list[int] = []
    layer = module.get_submodule(path)
    layer.register_forward_hook(lambda _module, _x, y: seen.append(y.shape[2]))
    module(torch.zeros(2, *SHAPE, device="meta"))
    return seen[0]
