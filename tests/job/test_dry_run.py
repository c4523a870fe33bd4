"""The dry run before data load: a network that does not fit gives an error of one line."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtan_hpc.batchnorm.conversion import convert_batchnorm
from fedtan_hpc.config.enums import (
    AlgorithmName,
    CohortMode,
    DataName,
    GammaName,
    ModelName,
    ModelSource,
    NormName,
)
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import AlgorithmConfig, CohortConfig, Config, DataConfig, ModelConfig
from fedtan_hpc.data.batching import Samples
from fedtan_hpc.job.dry_run import dry_run
from fedtan_hpc.models import factory
from fedtan_hpc.training.local_step import Loss
from fedtan_hpc.training.stacked.vmap_trial import vmap_error

SHAPE = (3, 32, 32)


def tells(config: Config) -> str:
    """Returns the error of the dry run, which is one line."""
    with pytest.raises(ConfigError) as caught:
        dry_run(config)
    [line] = caught.value.mistakes
    assert "\n" not in line
    return line


def job(
    model: ModelConfig, algorithm: str = "fedavg", shape: tuple[int, ...] = SHAPE, **options: Any
) -> Config:
    return Config(
        model=model,
        algorithm=AlgorithmConfig(name=AlgorithmName(algorithm), **options),
        data=DataConfig(name=DataName.synthetic, shape=list(shape)),
    )


def target(text: str) -> ModelConfig:
    return ModelConfig(source=ModelSource.import_, target=text)


def here(name: str) -> ModelConfig:
    return target(f"{__name__}:{name}")


def own_network(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))


class OwnClass(nn.Module):
    """Takes the number of classes only."""

    def __init__(self, *, classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def own_without_names(*sizes: object, **options: object) -> nn.Module:
    assert not sizes
    assert not options
    return OwnClass(classes=10)


def own_in_half() -> nn.Module:
    return OwnClass(classes=10).half()


def own_failure() -> nn.Module:
    raise RuntimeError("no weights\nand more")


def own_number() -> int:
    return 3


def own_scalar() -> nn.Module:
    return nn.Sequential(OwnClass(classes=1), nn.Flatten(0))


def own_lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10), nn.LazyBatchNorm1d())


def own_nothing() -> nn.Module:
    return nn.Flatten()


def own_subclass() -> nn.Module:
    class WithMore(nn.BatchNorm2d):
        pass

    return nn.Sequential(WithMore(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))


def own_without_statistics() -> nn.Module:
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    return nn.Sequential(norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))


class OwnDict(OwnClass):
    """Returns a dict in evaluation, which has no class scores."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if self.training else {}


def own_with_lock() -> nn.Module:
    network = OwnClass(classes=10)
    network.stem[2].lock = threading.Lock()  # type: ignore[assignment]
    return network


def own_scripted() -> nn.Module:
    network = OwnClass(classes=10)
    network.stem = torch.jit.script(network.stem)  # type: ignore[assignment]
    return network


def own_dict_in_evaluation() -> nn.Module:
    return OwnDict(classes=10)


CNN = ModelConfig(name=ModelName.cnn)
CLASSIFIERS = [name for name in ModelName if name is not ModelName.unet]

own_instance = nn.Flatten()

FITTING = [
    *(job(ModelConfig(name=name), "fedtan", (1, 8, 8)) for name in CLASSIFIERS),
    *(job(ModelConfig(name="cnn"), algorithm) for algorithm in AlgorithmName),
    *(job(here("own_network"), algorithm) for algorithm in ("fedavg", "centralised", "singleset")),
    job(here("own_without_names"), "fedtan"),
    job(here("own_in_half"), "fedavg_gn"),
    job(here("OwnClass"), "hbn"),
    job(here("own_without_statistics"), "fedavg_ln"),
    job(ModelConfig(name="cnn", norm=NormName.none), "singleset"),
    job(ModelConfig(source=ModelSource.torchvision, name="resnet18"), "fedtan", (1, 28, 28)),
    job(ModelConfig(source=ModelSource.torchvision, name="regnet_y_400mf"), "fedbn"),
    job(
        ModelConfig(source=ModelSource.torchvision, name="densenet121", small_input=True),
        "fedavg_gn",
        (1, 28, 28),
    ),
]


@pytest.mark.parametrize("config", FITTING, ids=lambda c: f"{c.model.name}-{c.algorithm.name}")
def test_a_network_that_fits_passes_and_leaves_no_trace(config: Config) -> None:
    before = torch.get_rng_state()
    dry_run(config)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("algorithm", ["fedtan", "fedbn", "silobn", "fixbn", "fbn", "hbn"])
def test_algorithms_about_batchnorm_need_some(algorithm: str) -> None:
    start = f"algorithm.name={algorithm}: allowed is one that does without BN layers"
    assert tells(job(here("own_network"), algorithm)).startswith(start)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("algorithm", ["fedtan", "fedavg"])
def test_scripted_layers_are_named(algorithm: str) -> None:
    line = tells(job(here("own_scripted"), algorithm))
    assert "of which no part is TorchScript, and stem is; return it without torch.jit" in line


@pytest.mark.parametrize("algorithm", ["fedtan", "fedbn"])
def test_a_network_that_cannot_be_copied_is_named_where_ranks_have_several_models(
    algorithm: str,
) -> None:
    """Five clients on four ranks, or models of the clients."""
    config = job(here("own_with_lock"), algorithm)
    with pytest.raises(ConfigError, match=r"copy.deepcopy refuses stem.2, a ReLU: TypeError"):
        dry_run(config, ranks=4)
    if algorithm == "fedtan":
        dry_run(config, ranks=5)


@pytest.mark.parametrize("algorithm", ["fedavg_gn", "fedavg_ln"])
def test_there_must_be_something_to_convert(algorithm: str) -> None:
    assert tells(job(here("own_network"), algorithm)).startswith(f"algorithm.name={algorithm}: ")
    options = here("own_network")
    options.norm = NormName.gn
    assert tells(job(options)).startswith("model.norm=gn: allowed is null, ")


@pytest.mark.parametrize("algorithm", ["fedtan", "silobn", "hbn"])
def test_running_statistics_must_exist_to_judge_the_network_by(algorithm: str) -> None:
    assert "running statistics" in tells(job(here("own_without_statistics"), algorithm))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("no_such_package:net", "ModuleNotFoundError: No module named 'no_such_package'"),
        (f"{__name__}:no_such_name", "AttributeError"),
        (f"{__name__}:SHAPE", "this is a tuple, not something that makes a network"),
        (f"{__name__}:own_instance", "this is a Flatten, not something that makes a network"),
        (f"{__name__}:own_failure", "it raised RuntimeError: no weights"),
        (f"{__name__}:own_number", "it returned a int"),
        (f"{__name__}:tells", "it raised TypeError: "),
        (f"{__name__}:own_scalar", "those of this one are (2,)"),
        (f"{__name__}:own_dict_in_evaluation", "those of this one are a dict with nothing"),
        (f"{__name__}:own_lazy", "without lazy layers"),
        (f"{__name__}:own_nothing", "that can be trained"),
        (f"{__name__}:own_subclass", "layer 0 is a WithMore"),
    ],
)
def test_a_wrong_target_is_one_line(text: str, part: str) -> None:
    for gamma in GammaName:
        options = ModelConfig(source=ModelSource.import_, target=text, gamma=gamma)
        line = tells(job(options))
        assert line.startswith(f"model.target={text}: allowed is ")
        assert part in line


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("resnet19", SHAPE, "did you mean resnet1"),
        ("fasterrcnn_resnet50_fpn", SHAPE, " classifiers; "),
        ("densenet121", (1, 28, 28), "use model.small_input=true, "),
        ("vit_b_16", SHAPE, "Expected 224 but got 32"),
    ],
)
def test_a_wrong_torchvision_network_is_one_line(
    name: str, shape: tuple[int, ...], part: str
) -> None:
    options = ModelConfig(source=ModelSource.torchvision, name=name)
    line = tells(job(options, shape=shape))
    assert line.startswith(f"model.name={name}: allowed is ")
    assert part in line


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize(
    ("name", "shape", "loss"),
    [
        ("googlenet", (3, 64, 64), "logits + 0.3 x aux_logits1 + 0.3 x aux_logits2"),
        ("inception_v3", (3, 299, 299), "logits + 0.4 x aux_logits"),
    ],
)
def test_networks_with_several_outputs_say_which_are_used(
    name: str, shape: tuple[int, ...], loss: str
) -> None:
    model = ModelConfig(source=ModelSource.torchvision, name=name)
    [line] = dry_run(job(model, shape=shape))
    assert f"its class scores are logits, its loss is that of {loss} " in line
    [line] = dry_run(job(replace(model, output="logits"), shape=shape))
    assert "its class scores are logits, and aux_logits" in line
    wrong = tells(job(replace(model, output="scores"), shape=shape))
    assert wrong.startswith("model.output=scores: allowed is the name or number of an output ")
    assert "with logits, aux_logits" in wrong


def test_an_output_is_named_only_if_there_are_several() -> None:
    assert dry_run(job(here("OwnClass"))) == []
    line = tells(job(replace(here("OwnClass"), output="logits")))
    assert (
        line
        == "model.output=logits: allowed is null, because the network returns a tensor; "
        + ("leave it out")
    )


def test_small_input_needs_a_stem_to_adapt() -> None:
    options = ModelConfig(source=ModelSource.torchvision, name="vgg11_bn", small_input=True)
    assert tells(job(options)).startswith("model.small_input=true: allowed is false ")


def test_groups_are_tried_too() -> None:
    line = tells(job(ModelConfig(name="cnn"), "fedavg_gn", groups=3))
    assert line.startswith("algorithm.groups=3: ")
    assert line.endswith("layer 1 has 16; try algorithm.groups=2")


def test_a_group_needs_two_values() -> None:
    """64 groups of 64 channels without pixels have one value each, which normalises to 0."""
    config = job(ModelConfig(), "fedavg_gn")
    config.algorithm.groups = 64
    assert tells(config).startswith("algorithm.groups=64: allowed is fewer groups")
    config.algorithm.groups = 32
    dry_run(config)


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        ({"algorithm": AlgorithmConfig(name=AlgorithmName.fedtan)}, False),
        ({"algorithm": AlgorithmConfig(name=AlgorithmName.fedtan), "local_steps": 1}, True),
        (
            {
                "algorithm": AlgorithmConfig(name=AlgorithmName.fedtan, synchronise_every=2),
                "local_steps": 1,
            },
            False,
        ),
        ({"algorithm": AlgorithmConfig(name=AlgorithmName.centralised)}, True),
        ({"algorithm": AlgorithmConfig(name=AlgorithmName.centralised), "clients": 1}, False),
        (
            {
                "algorithm": AlgorithmConfig(name=AlgorithmName.centralised),
                "clients_per_round": 1,
            },
            False,
        ),
        ({"algorithm": AlgorithmConfig(name=AlgorithmName.fedavg)}, False),
        ({"algorithm": AlgorithmConfig(name=AlgorithmName.fixbn)}, False),
        ({"algorithm": AlgorithmConfig(name=AlgorithmName.fbn)}, True),
        ({"algorithm": AlgorithmConfig(name=AlgorithmName.fedavg_gn)}, True),
        ({"algorithm": AlgorithmConfig(name=AlgorithmName.fedavg), "model": CNN}, True),
    ],
)
def test_batches_of_one_sample_are_refused_where_it_has_no_variance(
    words: dict[str, Any], allowed: bool
) -> None:
    """The mlp has BN on vectors, the cnn on images."""
    config = Config(**{"batch_size": 1, **words})
    if allowed:
        dry_run(config)
        return
    line = tells(config)
    assert line.startswith("batch_size=1: allowed is 2 or more, for BN layer 2 would ")
    assert "; set batch_size=2, or use " in line


class Counting(nn.Module):
    """Changes a buffer in forward; a stack of clients has only one such buffer."""

    moved: Tensor

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, classes)
        self.register_buffer("moved", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers(x)
        self.moved.lerp_(hidden.detach().mean(0), 0.1)
        return self.head(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["auto", "sequential", "stacked"])
def test_a_network_that_cannot_be_stacked_is_an_error_only_in_mode_stacked(mode: str) -> None:
    config = replace(
        job(here("Counting"), "fedtan", shape=(3, 4, 4)),
        cohort=CohortConfig(mode=CohortMode(mode)),
    )
    if mode != "stacked":
        dry_run(config)
        return
    line = tells(config)
    assert line.startswith("cohort.mode=stacked: allowed is auto or sequential, because ")


def test_a_network_that_can_be_stacked_is_no_error() -> None:
    config = job(here("own_network"), "fedavg", shape=(3, 4, 4))
    dry_run(replace(config, cohort=CohortConfig(mode=CohortMode.stacked)))
    model = convert_batchnorm(factory.build(ModelConfig(), (3, 4, 4), 5, seed=0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert (
        vmap_error(
            model,
            Samples(torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.int64)),
            Config(),
            Loss(),
        )
        is None
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
