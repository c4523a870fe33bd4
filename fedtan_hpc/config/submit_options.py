"""Options that say how a job is submitted to a cluster, and their checks.  Used by ``launch``."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from .enums import Choice
from .errors import ConfigError, format_option_error
from .schema import Config
from .validation.bounds import LAUNCH_BOUNDS, beyond, within


class ClusterName(Choice):
    """Where the job runs."""

    slurm = "slurm"
    local = "local"
    debug = "debug"


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """Sets where the job runs and what the cluster gives to it."""

    cluster: ClusterName = ClusterName.slurm
    """slurm; local: this machine, in the background; debug: this process, as one rank."""
    nodes: int = 1
    """Nodes of the job. Only for slurm."""
    tasks_per_node: int = 1
    """Ranks on each node."""
    gpus_per_task: int | None = None
    """GPUs of each rank: 1, or null for none."""
    cpus_per_task: int | None = None
    """CPUs of each rank, which also sets threads. Only for slurm."""
    mem_gb: float | None = None
    """Memory of each node in GB. Only for slurm."""
    timeout_min: int = 60
    """Time limit in minutes; a run that does not end before it is saved and queued again."""
    signal_delay_s: int = 90
    """Seconds before the time limit when the run is told to save; must exceed a round's time."""
    partition: str | None = None
    """Partition of SLURM."""
    account: str | None = None
    """Account of SLURM."""
    qos: str | None = None
    """Quality of service of SLURM."""
    constraint: str | None = None
    """Constraint of SLURM: features that the nodes must have."""
    name: str = "fedtan_hpc"
    """Name of the job in the queue."""
    array_parallelism: int = 256
    """Most points of a sweep (-m) that run at the same time. Only for slurm."""
    folder: str = "runs/submitted"
    """Folder for the files of submitit: logs of all ranks and pickled jobs."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, without dashes, such as ['reservation=mine',exclusive]."""


@dataclass(kw_only=True, slots=True)
class SubmitConfig(Config):
    """The options of a job and of its submission."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def job(self) -> Config:
        """Returns the options of the job alone."""
        return Config(**{each.name: getattr(self, each.name) for each in fields(Config)})


def check_launch(launch: LaunchConfig, ranks_per_client: int = 1) -> None:
    """Raises ``ConfigError`` with one line for each mistake in ``launch``."""
    numbers = beyond(launch, LAUNCH_BOUNDS, "launch.")
    possible = _mistakes(within(launch, LAUNCH_BOUNDS))
    others = [line for line in possible if line.partition("=")[0] not in numbers]
    ranks, size = launch.nodes * launch.tasks_per_node, ranks_per_client
    if not numbers and ranks % max(size, 1):
        allowed = f"a divisor of launch.nodes times launch.tasks_per_node, {ranks}"
        remedy = f"set launch.tasks_per_node={size}, or a multiple of it"
        others.append(format_option_error("ranks_per_client", size, allowed, remedy))
    if numbers or others:
        raise ConfigError(*numbers.values(), *others)


def _mistakes(launch: LaunchConfig) -> Iterator[str]:
    if launch.nodes > 1 and launch.cluster is not ClusterName.slurm:
        allowed = f"1 with launch.cluster={launch.cluster}, which is this machine"
        yield format_option_error("launch.nodes", launch.nodes, allowed, "set launch.cluster=slurm")
    if launch.tasks_per_node > 1 and launch.cluster is ClusterName.debug:
        allowed = "1 with launch.cluster=debug, which is this process"
        remedy = "set launch.cluster=local"
        yield format_option_error("launch.tasks_per_node", launch.tasks_per_node, allowed, remedy)
    if launch.signal_delay_s >= 60 * launch.timeout_min:
        allowed = f"below the time limit, {60 * launch.timeout_min} s"
        remedy = "set a longer launch.timeout_min"
        yield format_option_error("launch.signal_delay_s", launch.signal_delay_s, allowed, remedy)
