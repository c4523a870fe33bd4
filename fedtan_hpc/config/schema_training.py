"""The options of algorithm, task, network and optimizers.  Users import them from ``schema``."""

import math
from dataclasses import dataclass, field
from typing import Any

from . import enums

WORDS = "words"
"""Key in the metadata of an option whose type does not say which values are allowed."""

EVERY = {WORDS: "a whole number, auto or null"}
LAYERS = {WORDS: "all, auto, a list of names or null"}


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    """Chooses what BN normalises with and what is averaged."""

    name: enums.AlgorithmName = enums.AlgorithmName.fedtan
    """Federated algorithm; docs/methods.md says what each normalises with and averages."""
    synchronised_steps: int | None = None
    """Local steps with global statistics, from a round's first. Only for fedtan; default 1."""
    synchronise_every: Any = field(default=None, metadata=EVERY)
    """Rounds between synchronised ones; auto: as a probe decides. Only for fedtan; default 1."""
    deviation_limit: float | None = None
    """Gradient deviation up to which synchronise_every=auto waits longer. Default 0.5."""
    layers: Any = field(default=None, metadata=LAYERS)
    """BN layers that are synchronised; auto: a probe chooses. Only for fedtan; default all."""
    fraction: float | None = None
    """Share of the BN layers that layers=auto chooses. Default 0.5."""
    choosing_rounds: int | None = None
    """First rounds, with all layers, whose probe chooses for layers=auto. Default 3."""
    probe_run: str | None = None
    """Folder of a run whose probe.jsonl chooses for layers=auto, before the first round."""
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
    weights: str | None = None
    """File of initial values: a state_dict (.pt) or .safetensors; what does not fit stays fresh."""
    freeze: list[str] = field(default_factory=list)
    """Patterns of parameters and layers that do not train, such as [stem.*,*.bn1]."""
    norm: enums.NormName | None = None
    """Replacement for BN; null: the algorithm's. Only for fedavg, centralised and singleset."""
    gamma: enums.GammaName = enums.GammaName.ones
    """Initial scales of normalization layers: ones, or uniform in 0 to 1 (authors' code)."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """Sets the clients' optimizer."""

    name: enums.OptimizerName = enums.OptimizerName.sgd
    """Starts anew in every round. On the command line optimizer=adam and adamw set lr to 0.001."""
    lr: float = 0.1
    """Learning rate before lr_schedule."""
    momentum: float = 0.0
    """Momentum within the local steps of a round, from zero velocity. Only for sgd."""
    nesterov: bool = False
    """Nesterov's form of momentum. Only for sgd with momentum."""
    betas: list[float] | None = None
    """Decays of mean and squared gradient. Only for adam and adamw; default [0.9,0.999]."""
    eps: float | None = None
    """Added to the root of the squared gradient. Only for adam and adamw; default 1e-8."""
    weight_decay: float = 0.0
    """L2 penalty in the gradient; with adamw, decay of the parameters beside it."""
    decay_norm: bool = True
    """Whether normalization layers, biases and other vectors of parameters have weight decay."""
    clip_norm: float | None = None
    """Largest L2 norm of a client's gradient, FedProx's term included; null: not clipped."""


@dataclass(kw_only=True, slots=True)
class LrScheduleConfig:
    """Changes the learning rate from round to round."""

    name: enums.LrScheduleName = enums.LrScheduleName.multistep
    """multistep: falls after milestones; cosine, polynomial: from round to round, to final."""
    milestones: list[int] = field(default_factory=list)
    """Rounds, ascending, after which gamma multiplies the learning rate. Only for multistep."""
    gamma: float = 0.1
    """Factor on the learning rate at each milestone. Only for multistep."""
    warmup_rounds: int = 0
    """First rounds w, in which the rate rises: lr r / w in round r. Decay begins after them."""
    power: float | None = None
    """Exponent of the decay, 1 is linear. Only for polynomial; default 1."""
    final: float | None = None
    """Factor on lr that a round after the last would have. For cosine, polynomial; default 0."""

    def factor(self, round_number: int, rounds: int) -> float:
        """Returns the learning rate of a round, counted from 1, over that of ``optimizer.lr``.

        With t = (r - 1 - w) / (rounds - w), which is below 1 in the last round, cosine is
        final + (1 - final) (1 + cos(pi t)) / 2 and polynomial is final + (1 - final) (1 - t)^power.
        In the warm-up t is 0.
        """
        warmup = self.warmup_rounds
        rise = min(1.0, round_number / warmup) if warmup else 1.0
        if self.name is enums.LrScheduleName.multistep:
            return rise * self.gamma ** sum(each < round_number for each in self.milestones)
        done = max(0, round_number - 1 - warmup) / (rounds - warmup)
        if self.name is enums.LrScheduleName.cosine:
            shape = (1 + math.cos(math.pi * done)) / 2
        else:
            shape = (1 - done) ** (1.0 if self.power is None else self.power)
        final = self.final or 0.0
        return rise * (final + (1 - final) * shape)


@dataclass(kw_only=True, slots=True)
class EarlyStoppingConfig:
    """Ends the run by a metric."""

    metric: str | None = None
    """test_... or pooled_train_loss of rounds.jsonl; chooses best.pt too; null: no early end."""
    patience: int | None = None
    """Evaluations in succession without a better value after which the run ends; null: no end."""
    target: float | None = None
    """Value of the metric at which the run ends; null: none."""
    mode: enums.StoppingMode = enums.StoppingMode.auto
    """Better values: min or max; auto: min for names with loss, error, mae or mse, else max."""
