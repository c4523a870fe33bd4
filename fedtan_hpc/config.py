"""Every option of a job: its type, default, meaning and unit.  No torch, so that it loads fast."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Choice(str, Enum):
    """A named choice; it prints as its name."""

    __str__ = str.__str__


class AlgorithmName(Choice):
    """What is normalised with what: a row of ``algorithms.ALGORITHMS``."""

    fedtan = "fedtan"
    fedavg = "fedavg"


class DataName(Choice):
    """Data sets that ``data.load`` knows."""

    digits = "digits"
    synthetic = "synthetic"


class ModelName(Choice):
    """Networks that ``models.build`` knows."""

    mlp = "mlp"
    cnn = "cnn"
    resnet20 = "resnet20"


class PartitionName(Choice):
    """Ways to share the training samples out among the clients."""

    iid = "iid"
    shards = "shards"
    dirichlet = "dirichlet"


class DeviceName(Choice):
    """Where a rank computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class BackendName(Choice):
    """Who carries the collectives."""

    auto = "auto"
    gloo = "gloo"
    nccl = "nccl"


class ParticipationName(Choice):
    """How a round's participants are drawn."""

    uniform = "uniform"
    weighted = "weighted"


class PrecisionName(Choice):
    """Floating-point type of model and data."""

    float32 = "float32"
    float64 = "float64"


class CohortMode(Choice):
    """How a rank runs the local steps of its clients."""

    auto = "auto"
    stacked = "stacked"
    sequential = "sequential"


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    """Group ``algorithm``."""

    name: AlgorithmName = AlgorithmName.fedtan
    """Federated algorithm: fedtan (global BN statistics in the first local step) or fedavg."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Group ``data``.  Options left at null are the data set's own."""

    name: DataName = DataName.digits
    """Data set: digits (1,797 real handwritten digits, 8x8) or synthetic (Gaussian classes)."""
    samples: int | None = None
    """Samples in all, training (80 %) and test (20 %); synthetic only (there 10000)."""
    shape: list[int] | None = None
    """Shape of a sample, [channels, height, width]; synthetic only (there [3, 32, 32])."""
    classes: int | None = None
    """Number of classes; synthetic only (there 10)."""

    def facts(self) -> tuple[int, tuple[int, ...], int]:
        """Samples in all, the shape of one and the number of classes, before anything loads."""
        if self.name is DataName.digits:
            return 1797, (1, 8, 8), 10
        samples = 10_000 if self.samples is None else self.samples
        shape = (3, 32, 32) if self.shape is None else tuple(self.shape)
        return samples, shape, 10 if self.classes is None else self.classes


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Group ``model``."""

    name: ModelName = ModelName.mlp
    """Network: mlp (128 and 64 hidden units), cnn (three convolutions) or resnet20; all with BN."""


@dataclass(kw_only=True, slots=True)
class PartitionConfig:
    """Group ``partition``.  Options left at null belong to another partition."""

    name: PartitionName = PartitionName.shards
    """How samples are shared out: iid, shards (by label) or dirichlet (uneven label shares)."""
    classes_per_client: int | None = None
    """Classes that a client holds; shards only (there 2, or more if the clients are too few)."""
    alpha: float | None = None
    """Concentration of the label shares, small is uneven; dirichlet only (there 0.5)."""

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
    """Carrier of the collectives: auto is nccl with a GPU for each rank, else gloo."""
    timeout_seconds: float = 300.0
    """Seconds after which a collective that a rank does not join fails."""


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
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LrScheduleConfig = field(default_factory=LrScheduleConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    cohort: CohortConfig = field(default_factory=CohortConfig)
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
    seed: int = 0
    """Seed of the split, the partition, the initial model and every client's batches."""
    eval_every: int = 10
    """Rounds between evaluations on the test set; the last round is always evaluated."""
    check_every: int | None = None
    """Rounds between checks that all ranks hold the same model; null: when evaluating."""
    device: DeviceName = DeviceName.auto
    """Where ranks compute: auto is cuda where there is one, else cpu."""
    precision: PrecisionName = PrecisionName.float32
    """Floating-point type of model and data; float64 is for exact comparisons."""
    threads: int = 1
    """CPU threads of a rank."""
    run_dir: str | None = None
    """Folder of the results; null: runs/ and a name made from the other options."""


def to_dict(config: Config) -> dict[str, Any]:
    """The options as plain values (choices by name), nested as in the YAML files."""

    def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: str(v) if isinstance(v, Enum) else v for key, v in pairs}

    return asdict(config, dict_factory=plain)
