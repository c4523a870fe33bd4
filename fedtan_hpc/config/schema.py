"""The options of a job: type, default, meaning and unit.

``help`` makes ``--help`` and docs/options.md from the docstrings of the classes and of the fields.
The docstring of a class completes "the group ...".
"""

import math
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from . import enums
from .dataset_info import KNOWN_DATASETS, TEST_SHARE, DatasetInfo
from .errors import ConfigError, format_option_error


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
class DataConfig:
    """Chooses the data set, the part in use, and augmentation."""

    name: enums.DataName = enums.DataName.digits
    """Data set. digits and synthetic need no files; folder (images) and import are your own."""
    root: str | None = None
    """Folder with the data set's files; null: data/, or Debian's copy of fashion_mnist."""
    target: str | None = None
    """Function that returns the data, package.module:callable. Only for data=import."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the function, for example {site: 3}. Only for data=import."""
    train_samples: int | None = None
    """Training samples in use, a random subset stratified by class; null: all."""
    test_samples: int | None = None
    """Test samples in use, a random subset stratified by class; null: all."""
    loading: enums.LoadingName = enums.LoadingName.auto
    """Samples: device (in memory), stream (read batch by batch), auto: device if they fit."""
    workers: int | None = None
    """Processes of a rank that read batches of a stream; 0: none; null: by its CPUs, 1 to 8."""
    normalisation: enums.NormalisationName = enums.NormalisationName.training
    """Mean and deviation per channel of pixels: the training images', ImageNet's, or none."""
    image_size: int | None = None
    """Side in pixels of the square images that are cut out of your own. Only for folder, import."""
    resize: int | None = None
    """Shorter side in pixels to which images are scaled before the cut; null: image_size."""
    flip: bool = False
    """Augmentation: mirrors each training image left to right with probability 1/2."""
    crop_padding: int = 0
    """Augmentation: pads each training image with this many zero pixels, then crops at random."""
    random_resized_crop: bool = False
    """Augmentation: cuts 8 to 100 % of a training image's area at random and scales the piece."""
    colour_jitter: float = 0.0
    """Augmentation: largest relative change of brightness, contrast and saturation, 0 to 1."""
    transform: str | None = None
    """Augmentation: your function of one training input, package.module:callable."""
    samples: int | None = None
    """Number of samples, 80 % training and 20 % test. Only for synthetic; default 10000."""
    shape: list[int] | None = None
    """Shape of a sample, [channels, height, width]. Only for synthetic; default [3, 32, 32]."""
    classes: int | None = None
    """Number of classes. Only for synthetic; default 10."""

    @property
    def is_own(self) -> bool:
        """Whether the data are the user's: their sizes are known only once they are open."""
        return self.name in (enums.DataName.folder, enums.DataName.import_)

    def full_info(self) -> DatasetInfo:
        """Returns the sizes of the whole data set, without reading files.

        Raises ``ConfigError`` for the user's own data, of which they are not known.
        """
        if self.is_own:
            allowed = "a built-in data set, because the sizes of samples must be known here"
            remedy = "use data=synthetic with data.shape, data.classes and data.samples"
            raise ConfigError(format_option_error("data.name", self.name, allowed, remedy))
        if self.name is not enums.DataName.synthetic:
            return KNOWN_DATASETS[self.name]
        samples = 10_000 if self.samples is None else self.samples
        shape = (3, 32, 32) if self.shape is None else tuple(self.shape)
        classes = 10 if self.classes is None else self.classes
        test = math.ceil(samples * TEST_SHARE)
        return DatasetInfo(samples - test, test, shape, classes)

    def info(self) -> DatasetInfo:
        """Returns the sizes of the part of the data set that is in use, without reading files."""
        full = self.full_info()
        train = full.train if self.train_samples is None else self.train_samples
        test = full.test if self.test_samples is None else self.test_samples
        return full._replace(train=train, test=test)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Chooses the network, its normalization layers and its output."""

    source: enums.ModelSource = enums.ModelSource.builtin
    """Origin of the network: this package, torchvision, or your code (model.target)."""
    name: str = "mlp"
    """Network: mlp, cnn, resnet20, resnet32, resnet56, vgg11_bn, or the name of torchvision's."""
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
class PartitionConfig:
    """Divides the training samples among the clients."""

    name: enums.PartitionName = enums.PartitionName.shards
    """iid, by label (shards, dirichlet), by size (quantity), feature_shift, or your natural one."""
    classes_per_client: int | None = None
    """Classes per client. Only for shards; default 2, or more if few clients share all classes."""
    alpha: float | None = None
    """Dirichlet concentration; small is uneven. Only for dirichlet and quantity; default 0.5."""
    shift: enums.ShiftName | None = None
    """Transformation of each client's inputs. Only for feature_shift; default rotation."""
    strength: float | None = None
    """Largest angle in degrees (default 45) or intensity factor (2). Only for feature_shift."""

    def shard_classes(self, clients: int, classes: int) -> int:
        """Returns ``classes_per_client``; by default the least number >= 2 to use all classes."""
        return self.classes_per_client or min(classes, max(2, -(-classes // clients)))


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


@dataclass(kw_only=True, slots=True)
class CommConfig:
    """Sets the backend of collectives, and their time-out."""

    backend: enums.BackendName = enums.BackendName.auto
    """Backend of collectives. auto: nccl with one GPU per rank, mpi under mpirun, else gloo."""
    timeout_seconds: float = 300.0
    """Seconds after which a collective fails if a rank does not join it."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Sets how often checkpoints are written and how many are kept."""

    every: int | None = 20
    """Rounds between checkpoints; null: only when a signal stops the run."""
    keep: int = 2
    """Number of newest checkpoints to keep; more of them protect against damaged files."""


@dataclass(kw_only=True, slots=True)
class CohortConfig:
    """Sets how a rank trains the clients that it hosts in a round."""

    mode: enums.CohortMode = enums.CohortMode.auto
    """Local steps of a rank's clients: stacked (vmap) or sequential; auto: the faster of both."""
    max_stacked: int = 16
    """Most clients that a rank stacks at once, except in steps that need all its clients."""


@dataclass(kw_only=True, slots=True)
class Config:
    """All options of a job.  The default trains five clients that have two digits each."""

    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LrScheduleConfig = field(default_factory=LrScheduleConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    cohort: CohortConfig = field(default_factory=CohortConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    clients: int = 5
    """Number of clients, on any number of ranks; with partition=natural that of your data."""
    clients_per_round: int | None = None
    """Clients that take part in a round, drawn from seed and round; null: all."""
    participation: enums.ParticipationName = enums.ParticipationName.uniform
    """uniform: equal chances, weights p_k renormalised; weighted: chances p_k, equal weights."""
    rounds: int = 100
    """Communication rounds: local steps of the clients, then one average of their models."""
    local_steps: int = 5
    """SGD steps of a client in a round (E in the paper)."""
    batch_size: int = 32
    """Samples in a client's batch; a client with fewer samples uses all of them."""
    sampling: enums.SamplingName = enums.SamplingName.shuffled
    """Batches: shuffled (each sample once per pass), or replacement (as in the authors' code)."""
    seed: int = 0
    """Seed of the split, the partition, the initial model and all random draws in training."""
    eval_every: int = 10
    """Rounds between evaluations on the test set; the last round is always evaluated."""
    eval_train_samples: int = 10_000
    """Most training samples for the training loss of an evaluation; 0: none."""
    eval_clients: int | None = 100
    """Most clients whose personal models are evaluated; null: all that ever took part."""
    check_every: int | None = None
    """Rounds between checks that all ranks have equal models; null: at every evaluation."""
    device: enums.DeviceName = enums.DeviceName.auto
    """Device of the ranks. auto: cuda if there is a GPU, else cpu."""
    precision: enums.PrecisionName = enums.PrecisionName.float32
    """Floating-point type; float64 for exact comparisons; bfloat16 by autocast in training only."""
    tf32: bool = False
    """Multiplies float32 values on a GPU in TensorFloat-32: faster, 11 significant bits."""
    compile: bool = False
    """Compiles training steps (torch.compile); if one rank cannot, all run eagerly, with a note."""
    channels_last: bool = True
    """Stores images in channels-last format for convolutions, which is faster; not in float64."""
    threads: int | None = None
    """CPU threads of a rank; null: the CPUs that SLURM gives to a task, else 1."""
    resume: str = "auto"
    """auto: resumes from the newest intact checkpoint in run_dir; never; or a checkpoint's path."""
    run_dir: str | None = None
    """Folder of the results; null: runs/ and a name that is made from the other options."""
    callbacks: list[str] = field(default_factory=list)
    """package.module:callable each; rank 0 makes these callbacks and tells them of every round."""


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the options as plain values (choices by name), nested as in the YAML files."""

    def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: str(v) if isinstance(v, Enum) else v for key, v in pairs}

    return asdict(config, dict_factory=plain)
