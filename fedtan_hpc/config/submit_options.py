"""How a job is submitted: the options beside its own, and their mistakes.  No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from .enums import Choice
from .errors import ConfigError, format_option_error
from .schema import Config


class ClusterName(Choice):
    """Who runs the job."""

    slurm = "slurm"
    local = "local"
    debug = "debug"


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """Group ``launch``; options left at null are the cluster's own."""

    cluster: ClusterName = ClusterName.slurm
    """slurm; local: this machine, in the background; debug: this process, one rank."""
    nodes: int = 1
    """Nodes of the job; slurm only."""
    tasks_per_node: int = 1
    """Ranks on each node."""
    gpus_per_task: int | None = None
    """GPUs of each rank: 1, or null for none."""
    cpus_per_task: int | None = None
    """CPUs of each rank, which also sets threads; slurm only."""
    mem_gb: float | None = None
    """Memory of each node, in GB; slurm only."""
    timeout_min: int = 60
    """Time limit, in minutes; a run that is not done then is saved and queued again."""
    signal_delay_s: int = 90
    """Seconds before the limit at which the run is asked to save itself: longer than a round."""
    partition: str | None = None
    """SLURM's partition."""
    account: str | None = None
    """SLURM's account."""
    qos: str | None = None
    """SLURM's quality of service."""
    constraint: str | None = None
    """SLURM's constraint: features that the nodes must have."""
    name: str = "fedtan_hpc"
    """Name of the job in the queue."""
    array_parallelism: int = 256
    """Most points of a sweep (-m) that run at a time; slurm only."""
    folder: str = "runs/submitted"
    """Folder of submitit's files: the logs of all ranks and the pickled jobs."""
    sbatch: list[str] = field(default_factory=list)
    """More of sbatch's options, without dashes, such as ['reservation=mine',exclusive]."""


@dataclass(kw_only=True, slots=True)
class SubmitConfig(Config):
    """A job and its submission."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def job(self) -> Config:
        """The job by itself."""
        return Config(**{each.name: getattr(self, each.name) for each in fields(Config)})


def check_launch(launch: LaunchConfig) -> None:
    """Raise ``ConfigError`` with one line for each mistake."""
    if mistakes := list(_mistakes(launch)):
        raise ConfigError(*mistakes)


def _mistakes(launch: LaunchConfig) -> Iterator[str]:
    least = {"nodes": 1, "tasks_per_node": 1, "timeout_min": 1, "signal_delay_s": 1}
    least |= {"array_parallelism": 1}
    least |= {name: 1 for name in ("gpus_per_task", "cpus_per_task") if getattr(launch, name)}
    for name, bound in least.items():
        value = getattr(launch, name)
        if value < bound:
            option = f"launch.{name}"
            yield format_option_error(
                option, value, f"a whole number >= {bound}", f"set {option}={bound}"
            )
    if launch.mem_gb is not None and launch.mem_gb <= 0:
        remedy = "leave it out for the cluster's default"
        yield format_option_error("launch.mem_gb", launch.mem_gb, "a number > 0", remedy)
    if launch.nodes > 1 and launch.cluster is not ClusterName.slurm:
        allowed = f"1 with launch.cluster={launch.cluster}, which is this machine"
        yield format_option_error("launch.nodes", launch.nodes, allowed, "set launch.cluster=slurm")
    if launch.tasks_per_node > 1 and launch.cluster is ClusterName.debug:
        remedy = "set launch.cluster=local"
        allowed = "1 with launch.cluster=debug, which is this process"
        yield format_option_error("launch.tasks_per_node", launch.tasks_per_node, allowed, remedy)
    if launch.signal_delay_s >= 60 * launch.timeout_min:
        allowed = f"below the time limit, {60 * launch.timeout_min} s"
        remedy = "set a longer launch.timeout_min"
        yield format_option_error("launch.signal_delay_s", launch.signal_delay_s, allowed, remedy)
