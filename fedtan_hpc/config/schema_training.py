"""The options of algorithm, task, network and optimizers.  Users import them from ``schema``."""

from dataclasses import dataclass, field
from typing import Any

from . import enums


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    """Chooses what BN layers normalise with and what is averaged."""

    name: enums.AlgorithmName = enums.AlgorithmName.fedtan
    """Federated algorithm; docs/methods.md says what each normalises with and averages."""
    synchronised_steps: int | None = None
    """Local steps with global statistics, from a round's first. Only for fedtan; default 1."""
    synchronise_every: int | None = None
    """Rounds from one with synchronised steps to the next. Only for fedtan; default 1."""
    switch_round: int | None = None
    """First round with frozen statistics. Only for fixbn; default: after half of the rounds."""
    groups: int | None = None
    """Channel groups of group normalization. Only for fedavg_gn or model.norm=gn; default 2."""


@dataclass(kw_only=True, slots=True)
class ClientConfig:
    """Adds a term to each client's loss."""

    proximal_mu: float = 0.0
    """FedProx: adds mu / 2 times the squared distance from a round's initial model to the loss."""


@dataclass(kw_only=True, slots=True)
class ServerConfig:
    """Adds a server step on the averaged trainable parameters."""

    optimizer: enums.ServerOptimizerName = enums.ServerOptimizerName.none
    """FedOpt: server step on the round's mean change; none takes the clients' average itself."""
    lr: float | None = None
    """Server learning rate. Default 1 for momentum, 0.01 for adam and yogi."""
    momentum: float | None = None
    """Decay of the server's mean change (beta_1). Default 0.9."""
    beta2: float | None = None
    """Decay of the server's mean squared change. Only for adam and yogi; default 0.99."""
    tau: float | None = None
    """Added to the root of the mean squared change. Only for adam and yogi; default 1e-3."""


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """Chooses loss and metrics."""

    name: enums.TaskName = enums.TaskName.classification
    """classification (one class), multilabel, segmentation, regression, or import: your own."""
    target: str | None = None
    """Your task, a subclass of fedtan_hpc.Task, package.module:callable. Only for task=import."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of your task, for example {delta: 0.5}. Only for task=import."""
    class_weights: list[float] | None = None
    """Factor on each class's loss (multilabel: of targets 1). Not for regression and import."""
    label_smoothing: float = 0.0
    """Part of a target that all classes share, below 1. Not for regression and import."""
    ignore_index: int | None = None
    """Target value that does not count. Only for segmentation and multilabel."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Chooses the network, its normalization layers and its output."""

    source: enums.ModelSource = enums.ModelSource.builtin
    """Origin of the network: this package, torchvision, or your code (model.target)."""
    name: str = "mlp"
    """Network: mlp, cnn, resnet20, resnet32, resnet56, vgg11_bn, unet, or one of torchvision's."""
    target: str | None = None
    """Function that creates the network, package.module:callable. Only for model=import."""
    small_input: bool = False
    """Adapts the stem to small images: no stride, no pooling. Only for model=torchvision."""
    output: str | None = None
    """Name or number of the output that is the class scores; null: logits, out, or the first."""
    norm: enums.NormName | None = None
    """Replacement for BN; null: the algorithm's. Only for fedavg, centralised and singleset."""
    gamma: enums.GammaName = enums.GammaName.ones
    """Initial scales of normalization layers: ones, or uniform in 0 to 1 (authors' code)."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """Sets the clients' SGD, which starts anew in every round."""

    lr: float = 0.1
    """Learning rate of the first round."""
    momentum: float = 0.0
    """Momentum within the local steps of one round; each round starts with zero velocity."""
    weight_decay: float = 0.0
    """L2 penalty on all parameters, gamma and beta of BN layers included."""


@dataclass(kw_only=True, slots=True)
class LrScheduleConfig:
    """Lowers the learning rate after chosen rounds."""

    milestones: list[int] = field(default_factory=list)
    """Rounds, ascending, after which the learning rate is multiplied by lr_schedule.gamma."""
    gamma: float = 0.1
    """Factor on the learning rate at each milestone."""
