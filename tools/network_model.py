"""What a sum over ranks costs, and a round made of such sums and of local steps; no torch.

A message from one rank to another takes alpha + n beta: alpha seconds whatever it holds, and beta
seconds for each of its n bytes.  The ways to sum n bytes over p ranks (Thakur, Rabenseifner and
Gropp 2005, Optimization of collective communication operations in MPICH), L = ceil(log2 p):

    doubling    L alpha + L n beta                       every rank sends all, L times
    tree        2 L alpha + 2 n beta                     up and down a tree, cut into pieces
    ring        2 (p - 1) alpha + 2 (p - 1) / p n beta   every rank sends pieces to its neighbour

A network has some of them and takes the quickest.  Steps inside a node may have an alpha of their
own.  Adding up, several sums at a time, and waiting for a slow rank are not in the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fedtan_hpc import files

ALGORITHMS = ("doubling", "tree", "ring")


@dataclass(frozen=True, kw_only=True)
class Network:
    """What carries the sums."""

    name: str
    alpha_s: float
    """Seconds of a step between nodes, whatever it carries."""
    beta_s_per_byte: float
    """Seconds for each byte that a rank sends; 1 / bandwidth."""
    algorithms: tuple[str, ...] = ("doubling", "ring")
    """The ways it has, of which the quickest counts."""
    base_s: float = 0.0
    """Seconds of a sum that do not grow with the ranks."""
    ranks_a_node: int = 1
    """Bytes cost the same inside a node and between nodes."""
    node_alpha_s: float = 0.0
    """Seconds of a step inside a node, if a node has several ranks."""
    source: str = ""
    """Where the figures are from, and which of them are assumed."""
    ranks_measured: int | None = None
    """On how many ranks they were measured; null for a preset."""
    median_error: float | None = None
    worst_error: float | None = None
    """|model - measured| / measured over the sizes that were measured."""

    def all_reduce_seconds(self, size: float, ranks: int) -> float:
        """Of a sum of ``size`` bytes over ``ranks``; nothing for a single one."""
        if ranks == 1:
            return 0.0
        return self.base_s + min(self._seconds(way, size, ranks) for way in self.algorithms)

    def _seconds(self, way: str, size: float, ranks: int) -> float:
        outer, inner, factor = steps(way, ranks, self.ranks_a_node)
        latency = outer * self.alpha_s + inner * self.node_alpha_s
        return latency + factor * size * self.beta_s_per_byte


def steps(way: str, ranks: int, ranks_a_node: int = 1) -> tuple[float, float, float]:
    """Steps between nodes, steps inside them, and how often each byte is sent."""
    nodes = math.ceil(ranks / ranks_a_node)
    if way == "ring":
        return 2 * (nodes - 1), 2 * (ranks - nodes), 2 * (ranks - 1) / ranks
    outer = math.ceil(math.log2(nodes))
    inner = math.ceil(math.log2(min(ranks, ranks_a_node)))
    if way == "tree":
        return 2 * outer, 2 * inner, 2.0
    return outer, inner, float(outer + inner)


PRESETS = {
    network.name: network
    for network in (
        Network(
            name="nvlink_ndr",
            alpha_s=5e-6,
            beta_s_per_byte=1 / 40e9,
            algorithms=("tree", "ring"),
            base_s=4.4e-6,
            ranks_a_node=8,
            node_alpha_s=2e-6,
            source="NCCL over NVLink in nodes of 8 GPUs, an NDR InfiniBand port for each GPU. 5 µs "
            "a step over the network and 4.4 µs a call are what NCCL's own tuning table (its "
            "file tuning.cc) has for trees of small messages; the port's line rate is "
            "400 Gbit/s = 50 GB/s. Assumed: 80 % of that rate, and 2 µs a step inside a node, "
            "so that a small sum over 8 GPUs takes 16 µs",
        ),
        Network(
            name="ethernet25",
            alpha_s=30e-6,
            beta_s_per_byte=1 / 2.8e9,
            source="MPI over TCP on 25 gigabit Ethernet, a rank a node. The line rate is 25 Gbit/s "
            "= 3.1 GB/s; Cisco's engineers have told of some 10 µs one way for MPI over TCP on "
            "tuned hosts. Assumed: 30 µs on hosts that nobody has tuned, and 90 % of the rate",
        ),
        Network(
            name="wan50ms",
            alpha_s=25e-3,
            beta_s_per_byte=1 / 125e6,
            source="Ranks at sites of their own. All assumed: 50 ms there and back between any two "
            "sites, 1 Gbit/s = 125 MB/s at each, sums as MPI makes them, nothing lost",
        ),
    )
}


def write(path: Path, networks: Sequence[Network], **more: Any) -> None:
    """A JSON file of ``networks`` and of ``more`` to keep with them; whole or not at all."""
    content = {"networks": [asdict(network) for network in networks], **more}
    files.replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> list[Network]:
    """The networks of such a file; ``ValueError`` says what is wrong with it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("networks"), list):
        raise ValueError("it has no list of networks")
    return [_network(values) for values in content["networks"]]


def _network(values: Any) -> Network:
    known = {field.name for field in fields(Network)}
    if not isinstance(values, dict) or set(values) - known:
        raise ValueError(f"a network has the entries {', '.join(sorted(known))}")
    try:
        network = Network(**{**values, "algorithms": tuple(values["algorithms"])})
        numbers = [network.alpha_s, network.beta_s_per_byte, network.base_s, network.node_alpha_s]
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError("its times are to be finite numbers >= 0")
    except (KeyError, TypeError) as error:
        raise ValueError(f"a network is not whole: {error}") from error
    if not network.algorithms or set(network.algorithms) - set(ALGORITHMS):
        raise ValueError(f"algorithms are some of {', '.join(ALGORITHMS)}")
    if not isinstance(network.ranks_a_node, int) or network.ranks_a_node < 1:
        raise ValueError("ranks_a_node is to be a whole number >= 1")
    return network


@dataclass(frozen=True)
class Load:
    """What a rank computes in a round."""

    step_seconds: float
    """Of a local step of one client."""
    local_steps: int
    batch_size: int
    clients: int
    """That the busiest rank has."""

    @property
    def seconds(self) -> float:
        """Its clients take their steps one after another."""
        return self.step_seconds * self.local_steps * self.clients


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

    @property
    def communication(self) -> float:
        """All but local steps."""
        return self.statistics + self.gradients + self.average

    @property
    def seconds(self) -> float:
        """A whole round; nothing overlaps."""
        return self.compute + self.communication

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

    return Terms(
        compute=load.seconds,
        statistics=method.steps(load.local_steps) * sums(method.statistics),
        gradients=load.local_steps * sums(method.gradients),
        average=sums(method.average),
    )


def remedies(
    method: Method, load: Load, network: Network, ranks: int, target: float
) -> dict[str, int | str]:
    """The smallest value of each option that, alone, makes the efficiency ``target``.

    "already" where it is that, "none" where no value makes it so.  A step is taken to last as long
    as its batch is large.
    """
    now = terms(method, load, network, ranks)
    if now.efficiency >= target:
        return dict.fromkeys(("local_steps", "batch_size", "synchronise_every"), "already")
    allowed = (1 - target) / target  # seconds of communication for each of compute
    each_step = now.gradients + (now.statistics if method.synchronised_steps is None else 0.0)
    spare = (allowed * now.compute - each_step) / load.local_steps
    left = allowed * now.compute - now.gradients - now.average
    every_round = now.statistics * method.synchronise_every
    has_rounds_without = method.statistics and method.synchronised_steps is not None
    return {
        "local_steps": _at_least(now.communication - each_step, spare),
        "batch_size": _at_least(load.batch_size * now.communication, allowed * now.compute),
        "synchronise_every": _at_least(every_round, left) if has_rounds_without else "none",
    }


def _at_least(needed: float, of_one: float) -> int | str:
    """How many make up what is needed, rounding errors apart."""
    return math.ceil(needed / of_one * (1 - 1e-12)) if of_one > 0 else "none"
