"""Which rounds and which BN layers have global statistics, where a probe decides.

``job.trainer`` asks for the plan of each round and hands over what the probe finds.  All ranks
have the same records, and so the same plans; a run that goes on replays its records.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config import path_options
from ..config.algorithms import (
    AUTO,
    CHOOSING_ROUNDS,
    DEVIATION_LIMIT,
    FRACTION,
    RoundPlan,
    plan,
    synchronised_layers,
)
from ..config.errors import ConfigError, format_option_error
from ..config.schema import Config
from ..distributed.model_average import matches
from ..evaluation import probe_records
from ..evaluation.probe_records import ProbeRecord
from ..files import atomic_files, reading
from ..files.typed_values import fits

_LONGEST_GAP = 64
"""Most rounds from a synchronised one to the next, with synchronise_every=auto."""
_CAUSES = ("forward", "backward", "both")


CHOICE = "layers.json"
"""The layers that a run synchronises, if those of ``algorithm.probe_run`` have decided."""


def read_saved(config: Config, folder: Path) -> list[ProbeRecord]:
    """Returns the records of the option ``algorithm.probe_run``; none without it.

    None either if the run in ``folder`` has chosen before: a choice stays.  Raises ``ConfigError``
    if there are none, and ``FileError`` for a damaged file.
    """
    name = config.algorithm.probe_run
    if name is None or (config.resume != "never" and (folder / CHOICE).exists()):
        return []
    records = [*probe_records.read(path_options.expanded(name))]
    if not any(record.layers and record.clients for record in records):
        allowed = "the folder of a run that has probe.jsonl"
        remedy = "run it with probe.every=10 first"
        raise ConfigError(format_option_error("algorithm.probe_run", name, allowed, remedy))
    return records


def automatic_layers(config: Config, layers: int) -> int:
    """Returns how many of so many BN layers layers=auto chooses: the nearest whole number."""
    fraction = config.algorithm.fraction
    return int((FRACTION if fraction is None else fraction) * layers + 0.5)


def read_choice(folder: Path) -> list[str] | None:
    """Returns the layers that the run in ``folder`` has chosen by a saved probe; None if not."""
    try:
        names = reading.read_json(folder / CHOICE)
    except FileNotFoundError:
        return None
    if not fits(names, list[str]):
        raise reading.unusable(folder / CHOICE, "it is no list of names")
    return list(names)


class Schedule:
    """The plans of a run's rounds, for a model whose BN layers have the names ``layers``."""

    def __init__(
        self, config: Config, layers: Sequence[str], saved: Sequence[ProbeRecord] = ()
    ) -> None:
        """Raises ``ConfigError`` on all ranks if names or saved records do not fit the layers."""
        self.probes: list[ProbeRecord] = []
        """What the probe has found, in the order of the rounds."""
        self._config, self._layers = config, layers
        self._wanted = synchronised_layers(config.algorithm)
        self._limit = config.algorithm.deviation_limit or DEVIATION_LIMIT
        self._due, self._gap = 1, 1
        """The next synchronised round, and the rounds from the last one to it."""
        self._chosen: frozenset[str] | None = None
        """The layers with global statistics; None as long as they are all."""
        self._choosing_rounds = 0
        """Rounds whose records choose the layers and are not there yet."""
        if isinstance(self._wanted, list):
            self._chosen = frozenset(self._matching(self._wanted))
        elif self._wanted == AUTO:
            self._begin_choosing(saved)
        is_auto = config.algorithm.synchronise_every == AUTO
        self._is_adaptive = is_auto and plan(config, 1).synchronised_steps > 0
        self._is_adaptive &= self._chosen is None or bool(self._chosen)

    def plan(self, number: int) -> RoundPlan:
        """Returns the plan of round ``number``; those of earlier rounds must have been noted."""
        usual = plan(self._config, number)
        if not usual.synchronised_steps:
            return usual
        has_none = self._chosen is not None and not self._chosen
        if has_none or (self._is_adaptive and number != self._due):
            return replace(usual, synchronised_steps=0)
        has_all = self._chosen is None or len(self._chosen) == len(self._layers)
        return usual if has_all else replace(usual, layers=self._chosen)

    def causes(self, number: int) -> list[str]:
        """Returns the causes that a probe of round ``number`` must measure, the first ones first.

        Empty: the round is not probed.
        """
        wanted = []
        if self._is_adaptive and self.plan(number).synchronised_steps:
            wanted.append("both")
        if number <= self._choosing_rounds:
            wanted.append("backward")
        every = self._config.probe.every
        if every is not None and number % every == 0:
            wanted += [cause for cause in _CAUSES if cause not in wanted]
        return wanted

    def note(self, record: ProbeRecord) -> None:
        """Takes what the probe has found in a round, which may change the plans of later ones."""
        self.probes.append(record)
        if self._is_adaptive and record.round == self._due:
            deviation = record.total_deviation.get("both")
            is_small = deviation is not None and deviation <= self._limit
            self._gap = min(2 * self._gap, _LONGEST_GAP) if is_small else max(1, self._gap // 2)
            self._due += self._gap
        if record.round == self._choosing_rounds:
            self._choose(self.probes)

    def save_choice(self, folder: Path) -> None:
        """Writes what a saved probe has chosen, so that the run goes on with the same layers."""
        if self._config.algorithm.probe_run is not None and self._chosen is not None:
            names = json.dumps(sorted(self._chosen))
            atomic_files.replace_text(folder / CHOICE, names + "\n")

    def go_on(
        self, records: Sequence[ProbeRecord], rounds_done: int, choice: Sequence[str] | None = None
    ) -> None:
        """Takes the records of a run that goes on after ``rounds_done`` rounds, and its choice.

        Raises ``ConfigError`` on all ranks if one is missing that decides.
        """
        if choice is not None and self._config.algorithm.probe_run is not None:
            self._chosen, self._choosing_rounds = frozenset(choice), 0
        known = {record.round for record in records if record.layers}
        first = range(1, min(self._choosing_rounds, rounds_done) + 1)
        missing = [number for number in first if number not in known]
        for record in [] if missing else records:
            self.note(record)
        if self._is_adaptive and self._due <= rounds_done:
            missing.append(self._due)
        if missing:
            what = "synchronise_every" if self._is_adaptive else "layers"
            allowed = f"a run whose {probe_records.NAME} has the rounds that decide"
            remedy = f"it lacks round {missing[0]}, so begin anew with resume=never"
            _refuse(f"algorithm.{what}", AUTO, allowed, remedy)

    def _begin_choosing(self, saved: Sequence[ProbeRecord]) -> None:
        if self._count() == 0:
            self._chosen = frozenset()
        elif saved:
            self._choose(saved)
        elif self._count() < len(self._layers):
            self._choosing_rounds = self._config.algorithm.choosing_rounds or CHOOSING_ROUNDS

    def _count(self) -> int:
        return automatic_layers(self._config, len(self._layers))

    def _choose(self, records: Sequence[ProbeRecord]) -> None:
        """Chooses the layers with the largest mean divergence; of equal ones the first."""
        rows = [record.layer_means("kl_divergence") for record in records if record.layers]
        if any(row.keys() != set(self._layers) for row in rows):
            name = self._config.algorithm.probe_run
            allowed = f"a probe of a network with the BN layers {', '.join(self._layers[:5])}"
            _refuse("algorithm.probe_run", name, allowed, "probe a run of this network")
        means = {name: sum(row[name] for row in rows) / len(rows) for name in self._layers}
        ordered = sorted(self._layers, key=lambda name: -means[name])
        self._chosen = frozenset(ordered[: self._count()])

    def _matching(self, patterns: Sequence[str]) -> list[str]:
        for pattern in patterns:
            if not any(matches(name, pattern) for name in self._layers):
                near = ", ".join(self._layers[:5]) or "none"
                allowed = "names of BN layers of the network, with * for any letters"
                remedy = f"it matches none; the first are {near}"
                _refuse("algorithm.layers", pattern, allowed, remedy)
        return [name for name in self._layers if any(matches(name, each) for each in patterns)]


def _refuse(option: str, value: object, allowed: str, remedy: str) -> None:
    error = ConfigError(format_option_error(option, value, allowed, remedy))
    error.on_all_ranks = True
    raise error
