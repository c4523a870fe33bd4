"""What a sum over ranks costs; no torch.

A message from one rank to another takes alpha + n beta: alpha seconds whatever it holds, and beta
seconds for each of its n bytes.  The ways to sum n bytes over p ranks (Thakur, Rabenseifner and
Gropp 2005, Optimization of collective communication operations in MPICH), L = ceil(log2 p):

    doubling    L alpha + L n beta                       every rank sends all, L times
    tree        2 L alpha + 2 n beta                     up and down a tree, cut into pieces
    ring        2 (p - 1) alpha + 2 (p - 1) / p n beta   every rank sends pieces to its neighbour
    exchange    alpha + (p - 1) n beta                   every rank sends all to every other

Exchange is the package's own over gloo, for small messages; its larger ones take the ring.
A network has some of them and takes the quickest.  Steps inside a node may have an alpha of their
own.  A sum after computing takes longer than one in a row of sums: ranks do not arrive together,
and what carries the sum has to be woken.  That wait is measured, by how long was computed before;
on more ranks it grows as the largest of so many normal deviates (Blom 1958, Statistical Estimates
and Transformed Beta-Variables).
Adding up, and several sums at a time, are not in the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from fedtan_hpc.distributed.counters import EXCHANGED
from fedtan_hpc.runtime import atomic_files

ALGORITHMS = ("doubling", "tree", "ring", "exchange")


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
    waits: tuple[tuple[float, float], ...] = ()
    """Seconds of computing before a sum, and seconds that it then takes longer; none are known for
    a preset, whose rounds are therefore the least that they can be."""
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

    def wait_seconds(self, computed: float, ranks: int) -> float:
        """What a sum takes longer after so many seconds of computing; constant where unmeasured."""
        if ranks == 1 or not self.waits:
            return 0.0
        grown = _largest(ranks) / _largest(self.ranks_measured or ranks)
        seconds, waits = np.array(self.waits).T
        return grown * float(np.interp(computed, seconds, waits))

    def _seconds(self, way: str, size: float, ranks: int) -> float:
        outer, inner, factor = steps(taken(way, size), ranks, self.ranks_a_node)
        latency = outer * self.alpha_s + inner * self.node_alpha_s
        return latency + factor * size * self.beta_s_per_byte


def _largest(ranks: int) -> float:
    """Of so many normal deviates, the expected one, by Blom's approximation."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def taken(way: str, size: float) -> str:
    """The way that a message of ``size`` bytes takes."""
    return "ring" if way == "exchange" and size > EXCHANGED else way


def steps(way: str, ranks: int, ranks_a_node: int = 1) -> tuple[float, float, float]:
    """Steps between nodes, steps inside them, and how often each byte is sent."""
    nodes = math.ceil(ranks / ranks_a_node)
    if way == "ring":
        return 2 * (nodes - 1), 2 * (ranks - nodes), 2 * (ranks - 1) / ranks
    if way == "exchange":
        return float(nodes > 1), float(nodes == 1), float(ranks - 1)
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
    atomic_files.replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


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
        waits = tuple((float(computed), float(wait)) for computed, wait in values.get("waits", ()))
        found = {**values, "algorithms": tuple(values["algorithms"]), "waits": waits}
        network = Network(**found)
        numbers = [network.alpha_s, network.beta_s_per_byte, network.base_s, network.node_alpha_s]
        numbers += [number for pair in waits for number in pair]
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError("its times are to be finite numbers >= 0")
        if list(waits) != sorted(waits):
            raise ValueError("its waits are to be sorted")
    except (KeyError, TypeError) as error:
        raise ValueError(f"a network is not whole: {error}") from error
    if not network.algorithms or set(network.algorithms) - set(ALGORITHMS):
        raise ValueError(f"algorithms are some of {', '.join(ALGORITHMS)}")
    if not isinstance(network.ranks_a_node, int) or network.ranks_a_node < 1:
        raise ValueError("ranks_a_node is to be a whole number >= 1")
    _check_measurement(network)
    return network


def _check_measurement(network: Network) -> None:
    """Raise ``ValueError`` unless it is a whole one, or none."""
    ranks, errors = network.ranks_measured, (network.median_error, network.worst_error)
    if ranks is None and errors == (None, None):
        return
    if not isinstance(ranks, int) or ranks < 2:
        raise ValueError("ranks_measured is to be a whole number >= 2")
    if not all(isinstance(error, float | int) and error >= 0 for error in errors):
        raise ValueError("median_error and worst_error are to be numbers >= 0")
