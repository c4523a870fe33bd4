"""The options of a job: type, default, meaning and unit.

``help`` makes ``--help`` and docs/options.md from the docstrings of the classes and of the fields.
The docstring of a class completes "the group ...".
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from . import enums
from .schema_data import DataConfig, PartitionConfig
from .schema_training import (
    AlgorithmConfig,
    ClientConfig,
    EarlyStoppingConfig,
    LrScheduleConfig,
    ModelConfig,
    OptimizerConfig,
    ServerConfig,
    TaskConfig,
)

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "ClientConfig",
    "CohortConfig",
    "CommConfig",
    "Config",
    "DataConfig",
    "EarlyStoppingConfig",
    "LrScheduleConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PartitionConfig",
    "ProbeConfig",
    "ServerConfig",
    "TaskConfig",
    "TrackingConfig",
    "flat",
    "to_dict",
]


@dataclass(kw_only=True, slots=True)
class CommConfig:
    """Sets the collectives of the ranks."""

    backend: enums.BackendName = enums.BackendName.auto
    """Backend of collectives. auto: nccl with one GPU per rank, mpi under mpirun, else gloo."""
    timeout_seconds: float = 300.0
    """Seconds after which a collective fails if a rank does not join it."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Sets how often checkpoints are written."""

    every: int | None = 20
    """Rounds between checkpoints, and one at the end; null: only when a signal stops the run."""
    keep: int = 2
    """Number of newest checkpoints to keep; more of them protect against damaged files."""


@dataclass(kw_only=True, slots=True)
class CohortConfig:
    """Sets how a rank trains its clients."""

    mode: enums.CohortMode = enums.CohortMode.auto
    """Local steps of a rank's clients: stacked (vmap) or sequential; auto: the faster of both."""
    max_stacked: int = 16
    """Most clients that a rank stacks at once, except in steps that need all its clients."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Sets where options and figures of the run go for comparison."""

    to: list[enums.TrackerName] = field(default_factory=lambda: [enums.TrackerName.tensorboard])
    """Trackers that get options and figures; docs/tracking.md describes each."""
    project: str = "fedtan_hpc"
    """Project of Weights & Biases, experiment of MLflow."""
    name: str | None = None
    """Name of the run in both; null: the name of run_dir's last folder."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run in both; in MLflow each has the value true."""


@dataclass(kw_only=True, slots=True)
class ProbeConfig:
    """Measures what mismatched BN statistics do to the gradients."""

    every: int | None = None
    """Rounds between probes of the gradients, written to probe.jsonl; null: none."""


@dataclass(kw_only=True, slots=True)
class Config:
    """All options of a job.  The default trains five clients that have two digits each."""

    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LrScheduleConfig = field(default_factory=LrScheduleConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    cohort: CohortConfig = field(default_factory=CohortConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    clients: int = 5
    """Number of clients, on any number of ranks; with partition=natural that of your data."""
    clients_per_round: int | None = None
    """Clients that take part in a round, drawn from seed and round; null: all."""
    ranks_per_client: int = 1
    """Consecutive ranks that hold one client at a time; the number of ranks is a multiple of it."""
    participation: enums.ParticipationName = enums.ParticipationName.uniform
    """uniform: equal chances, weights p_k renormalised; weighted: chances p_k, equal weights."""
    rounds: int = 100
    """Communication rounds: local steps of the clients, then one average of their models."""
    local_steps: int = 5
    """Optimizer steps of a client in a round (E in the paper)."""
    local_epochs: int | None = None
    """Passes of a client over its samples in a round, in the place of local_steps; null: none."""
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
    """auto: resumes from the newest intact checkpoint in run_dir; never; or a run's folder."""
    resume_change: list[str] = field(default_factory=list)
    """Options or groups that may differ from the resumed run's, such as [rounds,optimizer.lr]."""
    resume_trust: bool = False
    """Resumes also from files that another user owns, or that every user can write."""
    run_dir: str | None = None
    """Folder of the results; null: runs/ and a name that is made from the other options."""
    run_dir_mode: enums.RunDirMode = enums.RunDirMode.private
    """Who may read a new folder of results: private, you alone; group, also its group."""
    callbacks: list[str] = field(default_factory=list)
    """package.module:callable each; rank 0 makes these callbacks and tells them of every round."""


def flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted name and value of each option of a nested mapping."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the options as plain values (choices by name), nested as in the YAML files."""

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(each) for each in value]
        return str(value) if isinstance(value, Enum) else value

    def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: named(value) for key, value in pairs}

    return asdict(config, dict_factory=plain)
