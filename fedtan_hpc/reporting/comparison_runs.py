"""The folder of a comparison: which runs belong to it, under which names.

settings.yaml  the options that all runs share
runs/          a run folder for each method and seed
compare.csv    a row for each evaluated round of each run
compare.md     the table
compare.png    the curves
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf

from ..config.errors import ConfigError, format_option_error
from ..config.schema import Config, to_dict
from ..config.validate import check
from ..runtime import atomic_files
from . import options, reports

OWN = ("methods", "seeds", "out")
_METHODS = ["fedtan", "fedavg", "centralised"]
_EXAMPLE = """'[fedtan,"fedtan algorithm.synchronised_steps=5",fedavg]'"""
_SET_HERE = {"algorithm": "methods=[...]", "seed": "seeds=[...]", "run_dir": "out=..."}
_LONGEST_NAME = 100
"""Letters of a run's folder; file systems take 255."""
_APART = (*reports.APART, "algorithm.name")


@dataclass(frozen=True)
class Comparison:
    """Where it is, what its runs share, and the runs that are asked for, by seed and method."""

    out: Path
    base: Config
    configs: Sequence[Config]

    @property
    def settings(self) -> dict[str, str]:
        """Options of all runs, by dotted name."""
        return shared(self.base)


def plan(words: Sequence[str]) -> Comparison:
    """Compose and check all runs that the command line asks for.

    Raises ``ConfigError`` with all mistakes that can be found before torch is loaded.
    """
    own, job = options.split(words, OWN)
    _not_set_here(job)
    default = "comparisons/" + (options.choice(job, "experiment") or "options")
    out = Path(options.folder(own.get("out", f"out={default}")))
    base = options.composed(job)
    methods = _methods(own["methods"]) if "methods" in own else _METHODS
    seeds = _seeds(own.get("seeds", "seeds=[0,1,2]"))
    each = list(_composed(methods, job))
    configs = [replace(config, seed=seed) for seed in seeds for config in each]
    asked = Comparison(out, base, [_placed(config, shared(base), out) for config in configs])
    _check(asked.configs)
    _same_settings(asked)
    return asked


def shared(config: Config) -> dict[str, str]:
    """Options that do not set the runs of a comparison apart, by dotted name."""
    flat = reports.flat(to_dict(config))
    return {name: value for name, value in flat if name not in _APART}


def label(options: Mapping[str, str], settings: Mapping[str, str]) -> str:
    """A run's algorithm, and the options that it alone has."""
    own = [
        f"{name.removeprefix('algorithm.')}={value}"
        for name, value in options.items()
        if name not in _APART and settings.get(name) != value
    ]
    return ", ".join([options["algorithm.name"], *own])


def name_of(config: Config, settings: Mapping[str, str]) -> str:
    """``label`` of a run that may not have begun."""
    return label(dict(reports.flat(to_dict(config))), settings)


def lines(comparison: Comparison) -> dict[str, list[reports.Run]]:
    """All finished runs of the folder, also those of other commands: by label, best first."""
    return _by_label(comparison.out, comparison.settings)


def finished_lines(out: Path) -> dict[str, list[reports.Run]]:
    """The same from the folder alone."""
    return _by_label(out, reports.read_options(out / "settings.yaml"))


def _by_label(out: Path, settings: Mapping[str, str]) -> dict[str, list[reports.Run]]:
    found: dict[str, list[reports.Run]] = {}
    for run in sorted(_readable(out), key=lambda run: int(run.options["seed"])):
        found.setdefault(label(run.options, settings), []).append(run)
    return reports.best_first(found)


def _readable(out: Path) -> Iterator[reports.Run]:
    """The finished runs; one that is damaged is left out, and said to be."""
    for path in out.glob("runs/*/summary.json"):
        try:
            run = reports.read(path.parent)
            if run.evaluated and run.messages and run.payloads:
                yield run
        except reports.DAMAGED as error:
            reason = " ".join(str(error).split())
            print(f"left out, for it cannot be read: {path.parent} ({reason})", file=sys.stderr)


def missing(comparison: Comparison) -> list[str]:
    """Runs that were asked for and are not finished."""
    return [
        f"{name_of(config, comparison.settings)} seed {config.seed}"
        for config in comparison.configs
        if not reports.finished(Path(str(config.run_dir)))
    ]


def others(comparison: Comparison, found: Mapping[str, Sequence[reports.Run]]) -> list[str]:
    """Finished runs of the folder that other commands asked for."""
    names = [(name_of(c, comparison.settings), str(c.seed)) for c in comparison.configs]
    runs = [(label, run.options["seed"]) for label, runs in found.items() for run in runs]
    return [f"{label} seed {seed}" for label, seed in runs if (label, seed) not in names]


def keep_settings(comparison: Comparison) -> None:
    """Write down what the runs share; for rank 0."""
    settings = to_dict(comparison.base)
    del settings["seed"], settings["run_dir"], settings["algorithm"]["name"]
    text = OmegaConf.to_yaml(OmegaConf.create(settings))
    with options.written(comparison.out):
        comparison.out.mkdir(parents=True, exist_ok=True)
        atomic_files.replace_text(comparison.out / "settings.yaml", text)


def _not_set_here(job: Sequence[str]) -> None:
    for word in job:
        name, _, value = word.lstrip("+~").partition("=")
        if name in _SET_HERE or name == "algorithm.name":
            own = _SET_HERE[name.partition(".")[0]]
            raise ConfigError(f"{name}={value}: this tool sets it itself; say {own} instead")


def _seeds(word: str) -> list[int]:
    seeds = options.values(word, "[0,1,2]")
    if not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds):
        text, allowed = word.partition("=")[2], "a list of whole numbers from 0 to 2^32 - 1"
        raise ConfigError(format_option_error("seeds", text, allowed, "try seeds=[0,1,2]"))
    return seeds


def _methods(word: str) -> list[str]:
    methods = options.values(word, _EXAMPLE)
    if not all(isinstance(method, str) for method in methods):
        allowed = "a list of algorithms, each with options of its own after it if it has any"
        remedy = f"for example methods={_EXAMPLE}"
        raise ConfigError(format_option_error("methods", word.partition("=")[2], allowed, remedy))
    return methods


def _composed(methods: Sequence[str], job: Sequence[str]) -> Iterator[Config]:
    """A method is an algorithm's name, and overrides after it if there are any."""
    for method in methods:
        name, *more = method.split() or [""]
        _not_set_here(more)
        yield options.composed([*job, f"algorithm={name}", *more])


def _placed(config: Config, settings: Mapping[str, str], out: Path) -> Config:
    label = name_of(config, settings)
    name = re.sub(r"[^A-Za-z0-9._=-]+", "_", label.replace(", ", "-"))
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return replace(config, run_dir=str(out / "runs" / f"{name}-seed{config.seed}"))


def _check(configs: Sequence[Config]) -> None:
    """All mistakes, those that runs have in common once."""
    mistakes: dict[str, None] = {}
    for config in configs:
        try:
            check(config)
        except ConfigError as error:
            mistakes |= dict.fromkeys(error.mistakes)
    if mistakes:
        raise ConfigError(*mistakes)


def _same_settings(asked: Comparison) -> None:
    """A folder is for one comparison."""
    path = asked.out / "settings.yaml"
    if not os.path.exists(path) or not list(asked.out.glob("runs/*/summary.json")):
        return
    try:
        saved = reports.read_options(path)
    except reports.DAMAGED as error:
        allowed = "a new folder, or one with a whole settings.yaml"
        raise ConfigError(
            format_option_error("out", asked.out, allowed, "choose another")
        ) from error
    now = asked.settings
    names = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    if names:
        allowed = "a new folder, or that of the same options"
        remedy = f"it holds a comparison with another {', '.join(names)}: choose another"
        raise ConfigError(format_option_error("out", asked.out, allowed, remedy))
