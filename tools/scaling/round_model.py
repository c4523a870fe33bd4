"""A round made of local steps and messages, and what would make it efficient; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from scaling.network_model import Network

_MOST = 2**40
"""More of an option than anybody wants."""


@dataclass(frozen=True)
class Load:
    """What a rank computes in a round."""

    step_seconds: float
    """Of a local step of one client."""
    local_steps: int
    batch_size: int
    clients: int
    """That the busiest rank has; they take their steps one after another."""
    synchronised_step_seconds: float | None = None
    """Of a step with global statistics, its messages apart; None: as long as any other."""
    pooled_step_seconds: float | None = None
    """Of one with pooled gradients too; None: as long as any with global statistics."""

    def scaled(self, batch_size: int) -> Load:
        """With another batch; a step is taken to last as long as its batch is large."""
        factor = batch_size / self.batch_size

        def times(seconds: float | None) -> float | None:
            return None if seconds is None else factor * seconds

        return replace(
            self,
            batch_size=batch_size,
            step_seconds=factor * self.step_seconds,
            synchronised_step_seconds=times(self.synchronised_step_seconds),
            pooled_step_seconds=times(self.pooled_step_seconds),
        )

    def whole_step_seconds(self, method: Method) -> float:
        """Of a step with all messages of ``method``."""
        whole = self.synchronised_step_seconds or self.step_seconds
        return (self.pooled_step_seconds or whole) if method.gradients else whole


@dataclass(frozen=True)
class Method:
    """The messages of a method, in bytes, the same on every rank."""

    name: str
    average: tuple[int, ...]
    """Once a round: the models, and the clients' losses."""
    statistics: tuple[int, ...] = ()
    """In each step with global statistics."""
    gradients: tuple[int, ...] = ()
    """In each local step."""
    synchronised_steps: int | None = 1
    """Steps of a round with global statistics; None: all."""
    synchronise_every: int = 1
    """Rounds from one with such steps to the next."""

    def steps(self, local_steps: int) -> float:
        """With global statistics in a round, the mean over rounds."""
        if not self.statistics:
            return 0.0
        if self.synchronised_steps is None:
            return local_steps
        return self.synchronised_steps / self.synchronise_every


@dataclass(frozen=True)
class Terms:
    """A round in seconds, by what they are spent on; the mean over rounds."""

    compute: float
    statistics: float
    gradients: float
    average: float
    waiting: float
    """In messages, for ranks that are not there yet."""

    @property
    def seconds(self) -> float:
        """A whole round; nothing overlaps."""
        return float(sum(asdict(self).values()))

    @property
    def efficiency(self) -> float:
        """The share of local steps, 0 to 1."""
        return self.compute / self.seconds

    @property
    def largest(self) -> str:
        """The name of the largest term."""
        return max(asdict(self).items(), key=lambda term: term[1])[0]


def terms(method: Method, load: Load, network: Network, ranks: int) -> Terms:
    """A round of ``method``."""

    def sums(messages: Sequence[int]) -> float:
        return sum(network.all_reduce_seconds(size, ranks) for size in messages)

    synchronised = method.steps(load.local_steps)
    step = load.clients * load.step_seconds
    whole = load.clients * load.whole_step_seconds(method)
    return Terms(
        compute=(load.local_steps - synchronised) * step + synchronised * whole,
        statistics=synchronised * sums(method.statistics),
        gradients=load.local_steps * sums(method.gradients),
        average=sums(method.average),
        waiting=_waiting(method, load.local_steps, (step, whole), network, ranks),
    )


def _waiting(
    method: Method, local_steps: int, seconds: tuple[float, float], network: Network, ranks: int
) -> float:
    """A synchronised step is cut into equal parts by its messages; the first of those at the end of
    a round comes after the steps without any."""
    step, whole = seconds
    synchronised = method.steps(local_steps)
    messages = len(method.statistics) + (1 if method.gradients else 0)
    waiting = 0.0
    if messages:
        part = network.wait_seconds(whole / messages, ranks)
        waiting += synchronised * messages * part
    if not method.gradients:
        waiting += network.wait_seconds((local_steps - synchronised) * step, ranks)
    return waiting


def remedies(
    method: Method, load: Load, network: Network, ranks: int, target: float
) -> dict[str, int | str]:
    """The smallest value of each option that, alone, makes the efficiency ``target``.

    "already" where it is that, "none" where no value makes it so.
    """
    if terms(method, load, network, ranks).efficiency >= target:
        return dict.fromkeys(("local_steps", "batch_size", "synchronise_every"), "already")

    def reaches(load: Load, method: Method = method) -> bool:
        # Rounding errors apart.
        return terms(method, load, network, ranks).efficiency >= target - 1e-12

    has_rounds_without = method.statistics and method.synchronised_steps is not None
    return {
        "local_steps": _smallest(lambda value: reaches(replace(load, local_steps=value))),
        "batch_size": _smallest(lambda value: reaches(load.scaled(value))),
        "synchronise_every": _smallest(
            lambda value: reaches(load, replace(method, synchronise_every=value))
        )
        if has_rounds_without
        else "none",
    }


def _smallest(is_enough: Callable[[int], bool]) -> int | str:
    """The smallest whole number that is enough, if all above it are too."""
    if not is_enough(_MOST):
        return "none"
    below, enough = 0, _MOST
    while enough - below > 1:
        middle = (below + enough) // 2
        below, enough = (below, middle) if is_enough(middle) else (middle, enough)
    return enough
