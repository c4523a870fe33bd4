"""Every option of a job: its type, default, meaning and unit.  No torch, so that it loads fast."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from .dataset_info import KNOWN_DATA, TEST_SHARE, DatasetInfo
from .enums import (
    AlgorithmName,
    BackendName,
    CohortMode,
    DataName,
    DeviceName,
    GammaName,
    ModelSource,
    NormalisationName,
    NormName,
    ParticipationName,
    PartitionName,
    PrecisionName,
    SamplingName,
    ServerOptimizerName,
    ShiftName,
)


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    """Group ``algorithm``."""

    name: AlgorithmName = AlgorithmName.fedtan
    """Federated algorithm: what is normalised with what, and what is averaged; see Methods."""
    synchronised_steps: int | None = None
    """Local steps of a round, from the first, with global statistics; fedtan only (there 1)."""
    synchronise_every: int | None = None
    """Rounds from one with synchronised steps to the next; fedtan only (there 1)."""
    switch_round: int | None = None
    """First round with frozen statistics; fixbn only (there after half of the rounds)."""
    groups: int | None = None
    """Groups of channels in group normalization; fedavg_gn or model.norm=gn only (there 2)."""


@dataclass(kw_only=True, slots=True)
class ClientConfig:
    """Group ``client``."""

    proximal_mu: float = 0.0
    """FedProx: the loss gains mu / 2 times the squared distance from the round's first values."""


@dataclass(kw_only=True, slots=True)
class ServerConfig:
    """Group ``server``: a step on averaged trainable values; running statistics have no part."""

    optimizer: ServerOptimizerName = ServerOptimizerName.none
    """FedOpt: none (take the average), momentum, adam or yogi on the round's mean change."""
    lr: float | None = None
    """Server learning rate; null: 1 with momentum, 0.01 with adam and yogi."""
    momentum: float | None = None
    """Share of the past in the mean change (beta_1); null: 0.9."""
    beta2: float | None = None
    """Share of the past in the mean squared change; adam and yogi only (there 0.99)."""
    tau: float | None = None
    """Added to the root of the mean squared change; adam and yogi only (there 1e-3)."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Group ``data``.  Options left at null are the data set's own."""

    name: DataName = DataName.digits
    """Data set; digits (1,797 real ones, 8x8) and synthetic (Gaussian classes) need no files."""
    root: str | None = None
    """Folder with the files of a data set; null: data/, and Debian's copy of fashion_mnist."""
    train_samples: int | None = None
    """Training samples to use, drawn by seed with each class's share; null: all."""
    test_samples: int | None = None
    """Test samples to use, drawn by seed with each class's share; null: all."""
    normalisation: NormalisationName = NormalisationName.training
    """Mean and deviation per channel: of the training pixels, or ImageNet's (3 channels only)."""
    flip: bool = False
    """Augmentation: mirror each training image left to right with chance 1/2."""
    crop_padding: int = 0
    """Augmentation: pad each training image by so many pixels of 0, then crop at random."""
    samples: int | None = None
    """Samples in all, training (80 %) and test (20 %); synthetic only (there 10000)."""
    shape: list[int] | None = None
    """Shape of a sample, [channels, height, width]; synthetic only (there [3, 32, 32])."""
    classes: int | None = None
    """Number of classes; synthetic only (there 10)."""

    def facts(self) -> DatasetInfo:
        """Sizes, before anything loads."""
        if self.name is DataName.synthetic:
            samples = 10_000 if self.samples is None else self.samples
            shape = (3, 32, 32) if self.shape is None else tuple(self.shape)
            classes = 10 if self.classes is None else self.classes
            test = math.ceil(samples * TEST_SHARE)
            facts = DatasetInfo(samples - test, test, shape, classes)
        else:
            facts = DatasetInfo(*KNOWN_DATA[str(self.name)])
        return DatasetInfo(
            facts.train if self.train_samples is None else self.train_samples,
            facts.test if self.test_samples is None else self.test_samples,
            facts.shape,
            facts.classes,
        )


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Group ``model``."""

    source: ModelSource = ModelSource.builtin
    """Where the network comes from: this package, torchvision or model.target."""
    name: str = "mlp"
    """Network: mlp, cnn, resnet20, resnet32, resnet56, vgg11_bn, or torchvision's name for one."""
    target: str | None = None
    """package.module:callable that makes the network; model=import only."""
    small_input: bool = False
    """Adapt the stem to small images: no stride, no pooling; model=torchvision only."""
    norm: NormName | None = None
    """What the network's BN layers become: bn, gn, ln or none; null: the algorithm's own."""
    gamma: GammaName = GammaName.ones
    """Initial scales of normalization layers: ones, or uniform in 0 to 1 as the authors' code."""


@dataclass(kw_only=True, slots=True)
class PartitionConfig:
    """Group ``partition``.  Options left at null belong to another partition."""

    name: PartitionName = PartitionName.shards
    """How samples are shared out: evenly, by label, by number, or with a shift of the inputs."""
    classes_per_client: int | None = None
    """Classes that a client holds; shards only (there 2, or more if the clients are too few)."""
    alpha: float | None = None
    """Concentration, small is uneven: of label shares (dirichlet) or sizes (quantity); 0.5."""
    shift: ShiftName | None = None
    """What each client's inputs go through; feature_shift only (there rotation)."""
    strength: float | None = None
    """Largest angle in degrees (45), or factor on intensity (2); feature_shift only."""

    def classes_held(self, clients: int, classes: int) -> int:
        """What ``classes_per_client`` says, else the least that shares all classes out, from 2."""
        return self.classes_per_client or min(classes, max(2, -(-classes // clients)))


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """Group ``optimizer``: SGD, made afresh for every client in every round."""

    lr: float = 0.1
    """Learning rate of the first round."""
    momentum: float = 0.0
    """Momentum over the local steps of one round; nothing survives the round."""
    weight_decay: float = 0.0
    """L2 penalty on all parameters, BN's gamma and beta included."""


@dataclass(kw_only=True, slots=True)
class LrScheduleConfig:
    """Group ``lr_schedule``."""

    milestones: list[int] = field(default_factory=list)
    """Rounds after which the learning rate is multiplied by gamma, ascending."""
    gamma: float = 0.1
    """Factor at each milestone."""


@dataclass(kw_only=True, slots=True)
class CommConfig:
    """Group ``comm``."""

    backend: BackendName = BackendName.auto
    """Carrier of the collectives: auto is nccl with a GPU for each rank, mpi by mpirun, or gloo."""
    timeout_seconds: float = 300.0
    """Seconds after which a collective that a rank does not join fails."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Group ``checkpoint``."""

    every: int | None = 20
    """Rounds between checkpoints; null: only when a signal asks the run to stop."""
    keep: int = 2
    """Checkpoints to keep, the newest; more guard against damaged ones."""


@dataclass(kw_only=True, slots=True)
class CohortConfig:
    """Group ``cohort``: the clients that one rank hosts in a round."""

    mode: CohortMode = CohortMode.auto
    """Local steps of a rank's clients: stacked, or sequential; auto is the faster on the device."""
    max_stacked: int = 16
    """Most clients of a rank that are stacked at a time, in steps that need not all be at once."""


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole job.  The default is five clients with two digits each."""

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
    """Number of clients, on any number of ranks."""
    clients_per_round: int | None = None
    """Clients that take part in a round, drawn by seed and round; null: all."""
    participation: ParticipationName = ParticipationName.uniform
    """uniform: equal chances, weights p_k renormalised; weighted: chances p_k, equal weights."""
    rounds: int = 100
    """Communication rounds: local steps, then one average of the models."""
    local_steps: int = 5
    """SGD steps of a client in a round (the paper's E)."""
    batch_size: int = 32
    """Samples in a client's batch; a client that has fewer uses all that it has."""
    sampling: SamplingName = SamplingName.shuffled
    """Batches: shuffled (each sample once a pass) or drawn with replacement (authors' code)."""
    seed: int = 0
    """Seed of the split, the partition, the initial model and every client's batches."""
    eval_every: int = 10
    """Rounds between evaluations on the test set; the last round is always evaluated."""
    eval_train_samples: int = 10_000
    """Most training samples of which the loss is taken when evaluating; 0: none."""
    eval_clients: int | None = 100
    """Most clients whose own models are judged, where they have such; null: all ever drawn."""
    check_every: int | None = None
    """Rounds between checks that all ranks hold the same model; null: when evaluating."""
    device: DeviceName = DeviceName.auto
    """Where ranks compute: auto is cuda where there is one, else cpu."""
    precision: PrecisionName = PrecisionName.float32
    """float64: exact comparisons; bfloat16: training's large operations alone, by autocast."""
    tf32: bool = False
    """On a GPU: float32's products and convolutions in TensorFloat-32, quicker, of 11 bits."""
    compile: bool = False
    """Compile training steps (torch.compile); if a rank cannot, all go on eagerly, and say so."""
    channels_last: bool = True
    """Keep images channels last in convolutions, which is faster; not in float64."""
    threads: int | None = None
    """CPU threads of a rank; null: the CPUs that SLURM gives a task, else 1."""
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint in run_dir; never; or a checkpoint's path."""
    run_dir: str | None = None
    """Folder of the results; null: runs/ and a name made from the other options."""


def to_dict(config: Config) -> dict[str, Any]:
    """The options as plain values (choices by name), nested as in the YAML files."""

    def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: str(v) if isinstance(v, Enum) else v for key, v in pairs}

    return asdict(config, dict_factory=plain)
