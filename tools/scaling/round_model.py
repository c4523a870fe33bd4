"""A round as local steps and messages, and what would make it efficient; without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scaling.network_model import Network

_LARGEST = 2**40
"""Upper limit of the search for an option's value; larger than any real one."""


@dataclass(frozen=True)
class Load:
    """The computing of a rank in a round."""

    step_seconds: float
    """Seconds of a local step of one client."""
    local_steps: int
    batch_size: int
    clients: int
    """Clients of the busiest rank; they take their steps one after another."""
    synchronised_step_seconds: float | None = None
    """Seconds of a step with global statistics, without its messages; None: a local step's."""
    pooled_step_seconds: float | None = None
    """Seconds of a step that also pools gradients; None: a synchronised step's."""
    ranks_per_client: int = 1
    """Ranks that hold a client together; the seconds are those of one rank's part of a batch."""

    def divided(self, ranks_per_client: int) -> Load:
        """Returns the load of each of so many ranks of a client; a step's time is divided."""
        return replace(self._times(1 / ranks_per_client), ranks_per_client=ranks_per_client)

    def scaled(self, batch_size: int) -> Load:
        """Returns the load with another batch size; a step's time is proportional to it."""
        return replace(self._times(batch_size / self.batch_size), batch_size=batch_size)

    def _times(self, factor: float) -> Load:
        changes = dict[str, Any]()
        for name in ("step_seconds", "synchronised_step_seconds", "pooled_step_seconds"):
            if (seconds := getattr(self, name)) is not None:
                changes[name] = factor * seconds
        return replace(self, **changes)

    def synchronised_seconds(self, method: Method) -> float:
        """Returns the seconds of one client's step with all messages of ``method``."""
        seconds = self.synchronised_step_seconds or self.step_seconds
        return (self.pooled_step_seconds or seconds) if method.gradients else seconds


@dataclass(frozen=True)
class Method:
    """The messages of a method, in bytes; they are equal on all ranks."""

    name: str
    average: tuple[int, ...]
    """Messages once a round: the models, and the clients' losses."""
    statistics: tuple[int, ...] = ()
    """Messages of each synchronised step."""
    gradients: tuple[int, ...] = ()
    """Messages of each local step."""
    client_statistics: tuple[int, ...] = ()
    """Messages of a local step between the ranks of one client, for BN layers."""
    client_statistics_beside: tuple[int, ...] = ()
    """Messages of a synchronised step between these ranks, for layers that are local in it."""
    client_gradients: tuple[int, ...] = ()
    """Messages of each step between these ranks."""
    synchronised_steps: int | None = 1
    """Synchronised steps of a round that has any; None: all steps."""
    synchronise_every: int = 1
    """Rounds from one with synchronised steps to the next."""

    def steps(self, local_steps: int) -> float:
        """Returns the number of synchronised steps in a round, as a mean over rounds."""
        if not self.statistics:
            return 0.0
        if self.synchronised_steps is None:
            return local_steps
        return self.synchronised_steps / self.synchronise_every


@dataclass(frozen=True)
class Terms:
    """The seconds of a round by what they are spent on, as means over rounds."""

    compute: float
    statistics: float
    gradients: float
    average: float
    client: float
    """Seconds in messages between the ranks that hold one client."""
    waiting: float
    """Seconds in messages for ranks that arrive later."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole round; nothing overlaps."""
        return float(sum(asdict(self).values()))

    @property
    def efficiency(self) -> float:
        """Share of the round that local steps take, from 0 to 1."""
        return self.compute / self.seconds

    @property
    def largest(self) -> str:
        """Name of the largest term."""
        return max(asdict(self).items(), key=lambda term: term[1])[0]


def terms(method: Method, load: Load, network: Network, ranks: int) -> Terms:
    """Returns the terms of a round of ``method`` on ``ranks``.

    Messages cut a synchronised step into equal parts.  The first message at the end of a round
    comes after the local steps, which have no messages.
    """

    def sums(messages: Sequence[int]) -> float:
        return sum(network.all_reduce_seconds(size, ranks) for size in messages)

    def client_sums(messages: Sequence[int]) -> float:
        return sum(network.all_reduce_seconds(size, load.ranks_per_client) for size in messages)

    synchronised = method.steps(load.local_steps)
    of_client = load.local_steps * client_sums(method.client_gradients)
    of_client += (load.local_steps - synchronised) * client_sums(method.client_statistics)
    of_client += synchronised * client_sums(method.client_statistics_beside)
    step = load.clients * load.synchronised_seconds(method)
    local = (load.local_steps - synchronised) * (load.clients * load.step_seconds)
    messages = len(method.statistics) + (1 if method.gradients else 0)
    waiting = 0.0
    if messages:
        waiting = synchronised * messages * network.wait_seconds(step / messages, ranks)
    if not method.gradients:
        waiting += network.wait_seconds(local, ranks)
    return Terms(
        compute=local + synchronised * step,
        statistics=synchronised * sums(method.statistics),
        gradients=load.local_steps * sums(method.gradients),
        average=sums(method.average),
        client=load.clients * of_client,
        waiting=waiting,
    )


def remedies(
    method: Method, load: Load, network: Network, ranks: int, target: float
) -> dict[str, int | str]:
    """Returns the smallest value of each option that alone reaches the efficiency ``target``.

    A value is "already" if the round reaches it as it is, and "none" if no value does.
    """
    if terms(method, load, network, ranks).efficiency >= target:
        return dict.fromkeys(("local_steps", "batch_size", "synchronise_every"), "already")

    def reaches(load: Load, method: Method = method) -> bool:
        # The margin is for rounding errors.
        return terms(method, load, network, ranks).efficiency >= target - 1e-12

    def with_period(value: int) -> bool:
        return reaches(load, replace(method, synchronise_every=value))

    has_period = method.statistics and method.synchronised_steps is not None
    return {
        "local_steps": _smallest(lambda value: reaches(replace(load, local_steps=value))),
        "batch_size": _smallest(lambda value: reaches(load.scaled(value))),
        "synchronise_every": _smallest(with_period) if has_period else "none",
    }


def _smallest(is_enough: Callable[[int], bool]) -> int | str:
    """Returns the smallest whole number that is enough, if every larger one is enough too."""
    if not is_enough(_LARGEST):
        return "none"
    below, enough = 0, _LARGEST
    while enough - below > 1:
        middle = (below + enough) // 2
        below, enough = (below, middle) if is_enough(middle) else (middle, enough)
    return enough
