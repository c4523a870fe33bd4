"""What built-in data and their clients need of a rank's memory, known from the options alone.

``job`` refuses what cannot fit before work begins, and says what will take long.  Sizes are lower
bounds, so that nothing is refused that could run.
"""

from collections.abc import Iterator, Mapping
from math import prod

from ..config.enums import DataName, PartitionName, PrecisionName, SamplingName
from ..config.errors import ConfigError, format_option_error
from ..config.schema import Config

_SAMPLE_BYTES = 80
"""Bytes of a synthetic sample while the set is split: class, indices, orders; 90 measured."""
_CLIENT_BYTES, _PIECE_BYTES = 200, 100
"""Bytes for the indices, sizes and weights of a client, and for each of its classes."""
_SECONDS = {"sample": 0.8e-6, "client": 5e-6, "piece": 4e-6}
"""Time for the split and the partition, on one core of an AMD EPYC (Python 3.11, numpy 2.4)."""
_LONG = 3.0
"""Seconds of work before the first round that is announced."""


def check(needed: Mapping[str, int], free: int | None) -> None:
    """Raises ``ConfigError`` if the bytes ``needed``, by option, exceed those that are ``free``.

    It names the option that needs the most; its value stands behind the name.
    """
    total = sum(needed.values())
    if free is None or total <= free:
        return
    option, _, value = max(needed, key=needed.__getitem__).partition("=")
    allowed = f"what fits in memory: this needs {total / 1e9:.1f} GB or more on each rank"
    remedy = "use less, or fewer ranks on a node, or a node with more memory"
    line = f"{allowed}, and {free / 1e9:.1f} GB are free for it"
    raise ConfigError(format_option_error(option, value, line, remedy))


def data_bytes(config: Config) -> dict[str, int]:
    """Returns the bytes on a rank by the option that decides them, written option=value."""
    info, data = config.data.info(), config.data
    sample = prod(info.shape) * (8 if config.precision is PrecisionName.float64 else 4)
    batch = min(config.batch_size, -(-info.train // config.clients))
    if config.sampling is SamplingName.replacement or config.compile:
        batch = config.batch_size
    clients = config.clients * _CLIENT_BYTES + _pieces(config) * _PIECE_BYTES
    needed = {
        f"batch_size={config.batch_size}": batch * (sample + 8),
        f"clients={config.clients}": clients,
    }
    if data.name is DataName.synthetic:
        full = data.full_info()
        needed[f"data.samples={full.train + full.test}"] = (full.train + full.test) * _SAMPLE_BYTES
        means = 16 * full.classes * prod(full.shape)  # in float64, twice while they are drawn
        is_shape = prod(full.shape) > full.classes
        option, value = ("shape", list(full.shape)) if is_shape else ("classes", full.classes)
        needed[f"data.{option}={value}"] = means
    return needed


def _pieces(config: Config) -> int:
    """Returns how many arrays of indices a partition by class has before they are joined."""
    classes = config.data.info().classes
    if config.partition.name is PartitionName.dirichlet:
        return config.clients * classes
    if config.partition.name is PartitionName.shards:
        return config.clients * config.partition.shard_classes(config.clients, classes)
    return 0


def long_work(config: Config) -> Iterator[str]:
    """Yields a line for what takes more than a few seconds before the first round."""
    full = config.data.full_info()
    samples = full.train + full.test
    if samples * _SECONDS["sample"] > _LONG:
        yield f"making a data set of {samples} samples, which takes a while"
    work = config.clients * _SECONDS["client"] + _pieces(config) * _SECONDS["piece"]
    if work > _LONG:
        yield f"making the partition of {config.clients} clients, which takes a while"
