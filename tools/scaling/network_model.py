"""Time of a sum over ranks; without torch.

A message between two ranks takes alpha + n beta: alpha seconds for any message, and beta seconds
for each of its n bytes.  Algorithms that sum n bytes over p ranks (Thakur, Rabenseifner and Gropp
2005, Optimization of collective communication operations in MPICH), with L = ceil(log2 p):

    doubling    L alpha + L n beta                       each rank sends everything, L times
    tree        2 L alpha + 2 n beta                     pieces go up and down a tree
    ring        2 (p - 1) alpha + 2 (p - 1) / p n beta   each rank sends pieces to its neighbour
    exchange    alpha + (p - 1) n beta                   each rank sends everything to all others

This package uses exchange over gloo for small messages, and the ring for larger ones.  A network
has some of these algorithms and uses the fastest.  Steps inside a node may have their own alpha.

A sum after computing takes longer than a sum after a sum: ranks arrive at different times, and the
backend has to wake up.  This wait is measured for several durations of computing.  On more ranks it
grows like the expected largest of p normal deviates (Blom 1958, Statistical Estimates and
Transformed Beta-Variables).  The model leaves out additions, and sums that run at the same time.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from fedtan_hpc.distributed.counters import MAX_EXCHANGE_BYTES
from fedtan_hpc.files import atomic_files

ALGORITHMS = ("doubling", "tree", "ring", "exchange")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network between ranks, with the figures of the model."""

    name: str
    alpha_s: float
    """Seconds of a step between nodes, for a message of any size."""
    beta_s_per_byte: float
    """Seconds for each byte that a rank sends; 1 / bandwidth."""
    algorithms: tuple[str, ...] = ("doubling", "ring")
    """Algorithms that it has; the fastest one counts."""
    base_s: float = 0.0
    """Seconds of a sum that do not grow with the number of ranks."""
    ranks_a_node: int = 1
    """Ranks of a node; a byte costs the same inside a node and between nodes."""
    node_alpha_s: float = 0.0
    """Seconds of a step inside a node, if a node has several ranks."""
    waits: tuple[tuple[float, float], ...] = ()
    """Seconds of computing before a sum, and extra seconds of that sum.  A preset has none, so that
    its predicted rounds are lower bounds."""
    source: str = ""
    """Origin of the figures, and which of them are assumed."""
    ranks_measured: int | None = None
    """Number of ranks in the measurement; null for a preset."""
    median_error: float | None = None
    worst_error: float | None = None
    """|model - measured| / measured over the measured sizes."""

    def all_reduce_seconds(self, size: float, ranks: int) -> float:
        """Returns the seconds of a sum of ``size`` bytes over ``ranks``; 0 for one rank."""
        if ranks == 1:
            return 0.0
        return self.base_s + min(self._seconds(name, size, ranks) for name in self.algorithms)

    def wait_seconds(self, computed: float, ranks: int) -> float:
        """Returns the extra seconds of a sum after ``computed`` seconds of computing.

        Outside of the measured durations the nearest one counts.
        """
        if ranks == 1 or not self.waits:
            return 0.0
        growth = _largest_deviate(ranks) / _largest_deviate(self.ranks_measured or ranks)
        seconds, waits = np.array(self.waits).T
        return growth * float(np.interp(computed, seconds, waits))

    def _seconds(self, algorithm: str, size: float, ranks: int) -> float:
        outer, inner, factor = steps(algorithm_for(algorithm, size), ranks, self.ranks_a_node)
        latency = outer * self.alpha_s + inner * self.node_alpha_s
        return latency + factor * size * self.beta_s_per_byte


def _largest_deviate(number: int) -> float:
    """Returns the expected largest of ``number`` normal deviates, by Blom's approximation."""
    return NormalDist().inv_cdf((number - 0.375) / (number + 0.25))


def algorithm_for(algorithm: str, size: float) -> str:
    """Returns the algorithm that sums ``size`` bytes: exchange leaves large messages to ring."""
    return "ring" if algorithm == "exchange" and size > MAX_EXCHANGE_BYTES else algorithm


def steps(algorithm: str, ranks: int, ranks_a_node: int = 1) -> tuple[float, float, float]:
    """Returns the steps between nodes, the steps inside nodes, and how often a byte is sent."""
    nodes = math.ceil(ranks / ranks_a_node)
    if algorithm == "ring":
        return 2 * (nodes - 1), 2 * (ranks - nodes), 2 * (ranks - 1) / ranks
    if algorithm == "exchange":
        return float(nodes > 1), float(nodes == 1), float(ranks - 1)
    outer = math.ceil(math.log2(nodes))
    inner = math.ceil(math.log2(min(ranks, ranks_a_node)))
    if algorithm == "tree":
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
            source="NCCL over NVLink in nodes of 8 GPUs, one NDR InfiniBand port for each GPU. The "
            "tuning table of NCCL (file tuning.cc) has 5 µs a step over the network and 4.4 µs a "
            "call for trees of small messages; the port's line rate is 400 Gbit/s = 50 GB/s. "
            "Assumed: 80 % of that rate, and 2 µs a step inside a node, so that a small sum over "
            "8 GPUs takes 16 µs",
        ),
        Network(
            name="ethernet25",
            alpha_s=30e-6,
            beta_s_per_byte=1 / 2.8e9,
            source="MPI over TCP on 25 gigabit Ethernet, one rank a node. The line rate is "
            "25 Gbit/s = 3.1 GB/s; Cisco's engineers report about 10 µs one way for MPI over TCP "
            "on tuned hosts. Assumed: 30 µs on hosts without tuning, and 90 % of the rate",
        ),
        Network(
            name="wan50ms",
            alpha_s=25e-3,
            beta_s_per_byte=1 / 125e6,
            source="Each rank at another site. All assumed: a round trip of 50 ms between any two "
            "sites, 1 Gbit/s = 125 MB/s at each, sums by MPI's algorithms, no lost packets",
        ),
    )
}


def write(path: Path, networks: Sequence[Network], **more: Any) -> None:
    """Writes a JSON file of ``networks`` with the entries ``more``; atomically."""
    content = {"networks": [asdict(network) for network in networks], **more}
    atomic_files.replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> list[Network]:
    """Returns the networks of a file that ``write`` wrote; raises ``ValueError``."""
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
        network = Network(**{**values, "algorithms": tuple(values["algorithms"]), "waits": waits})
        mistakes = list(_mistakes(network))
    except (KeyError, TypeError) as error:
        raise ValueError(f"a network is incomplete: {error}") from error
    if mistakes:
        raise ValueError(mistakes[0])
    return network


def _mistakes(network: Network) -> Iterator[str]:
    times = [network.alpha_s, network.beta_s_per_byte, network.base_s, network.node_alpha_s]
    times += [number for pair in network.waits for number in pair]
    if not all(math.isfinite(time) and time >= 0 for time in times):
        yield "times must be finite numbers >= 0"
    if list(network.waits) != sorted(network.waits):
        yield "waits must be sorted"
    if not network.algorithms or set(network.algorithms) - set(ALGORITHMS):
        yield f"algorithms are some of {', '.join(ALGORITHMS)}"
    if not isinstance(network.ranks_a_node, int) or network.ranks_a_node < 1:
        yield "ranks_a_node must be a whole number >= 1"
    ranks, errors = network.ranks_measured, (network.median_error, network.worst_error)
    if ranks is None and errors == (None, None):
        return
    if not isinstance(ranks, int) or ranks < 2:
        yield "ranks_measured must be a whole number >= 2"
    if not all(isinstance(error, float | int) and error >= 0 for error in errors):
        yield "median_error and worst_error must be numbers >= 0"
