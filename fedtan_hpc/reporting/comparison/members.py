"""The folder of a comparison: which runs belong to it, and under which names.

settings.yaml  the options that all runs share
runs/          a run folder for each method and seed
compare.csv    a row for each evaluated round of each run
compare.md     the table
compare.png    the curves
probe*.png     what probes have found, if runs have probes

Used by ``compare``, which fills the folder, and by ``overview``.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf

from ...config.enums import PartitionName
from ...config.errors import ConfigError, check_together, format_option_error
from ...config.schema import Config, to_dict
from ...config.validate import check
from ...files import atomic_files
from .. import options, reports
from ..reports import Lines

_TOOL_OPTIONS = ("methods", "seeds", "out")
_METHODS = ["fedtan", "fedavg", "centralised"]
_EXAMPLE = """'[fedtan,"fedtan algorithm.synchronised_steps=5",fedavg]'"""
_SET_BY_TOOL = {"algorithm": "methods=[...]", "seed": "seeds=[...]", "run_dir": "out=..."}
_LONGEST_NAME = 100
"""Letters of the name of a run's folder; file systems take 255."""
_NOT_SHARED = (*reports.IGNORED, "algorithm.name")


@dataclass(frozen=True)
class Comparison:
    """A folder, the options that its runs share, and the requested runs by seed and method."""

    out: Path
    base: Config
    configs: Sequence[Config]

    @property
    def settings(self) -> dict[str, str]:
        """Options that all runs share unless a method changes them, by dotted name."""
        return shared_options(self.base)

    @property
    def unfinished(self) -> list[Config]:
        """Requested runs that are not finished."""
        return [each for each in self.configs if not reports.finished(Path(str(each.run_dir)))]

    def name_of(self, config: Config) -> str:
        """Returns the label and the seed of a run, which need not have begun."""
        label = _label(dict(reports.flat(to_dict(config))), self.settings)
        return f"{label} seed {config.seed}"


def plan(words: Sequence[str]) -> Comparison:
    """Composes and checks all runs that the command line asks for.

    Raises ``ConfigError`` with all mistakes that can be found before torch is loaded.
    """
    tool_options, job = options.split(words, _TOOL_OPTIONS)
    _refuse_tool_settings(job)
    experiments = [word for word in job if word.startswith("experiment=")]
    name = experiments[-1].partition("=")[2] if experiments else "options"
    out = Path(options.folder(tool_options.get("out", f"out=comparisons/{name}")))
    base = options.composed(job)
    methods = _methods(tool_options["methods"]) if "methods" in tool_options else _METHODS
    seeds = _seeds(tool_options.get("seeds", "seeds=[0,1,2]"))
    variants = list(_composed(methods, job))
    configs = [replace(config, seed=seed) for seed in seeds for config in variants]
    comparison = Comparison(out, base, configs)
    for config in configs:
        config.run_dir = str(out / "runs" / _run_name(comparison.name_of(config)))
    check_together(partial(check, config) for config in configs)
    _check_settings(comparison)
    return comparison


def shared_options(config: Config) -> dict[str, str]:
    """Returns the options in which the runs of a comparison agree, by dotted name."""
    return _shared(dict(reports.flat(to_dict(config))))


def _shared(options: Mapping[str, str]) -> dict[str, str]:
    """Leaves out the number of natural clients, which a run takes from its data."""
    is_natural = options["partition.name"] == PartitionName.natural
    ignored = (*_NOT_SHARED, "clients") if is_natural else _NOT_SHARED
    return {name: value for name, value in options.items() if name not in ignored}


def finished_lines(out: Path, settings: Mapping[str, str]) -> Lines:
    """Returns the finished runs in ``out``, of this and other commands: by label, best first."""
    runs = reports.read_whole(path.parent for path in out.glob("runs/*/summary.json"))
    lines: Lines = {}
    for run in sorted(runs, key=lambda run: int(run.options["seed"])):
        lines.setdefault(_label(run.options, settings), []).append(run)
    return reports.best_first(lines)


def _label(options: Mapping[str, str], settings: Mapping[str, str]) -> str:
    differing = [
        f"{name.removeprefix('algorithm.')}={value}"
        for name, value in _shared(options).items()
        if settings.get(name) != value
    ]
    return ", ".join([options["algorithm.name"], *differing])


def unrequested(comparison: Comparison, lines: Lines) -> list[str]:
    """Returns the names of finished runs in the folder that this command did not ask for."""
    requested = {comparison.name_of(config) for config in comparison.configs}
    names = [f"{label} seed {run.options['seed']}" for label, runs in lines.items() for run in runs]
    return [name for name in names if name not in requested]


def write_settings(comparison: Comparison) -> None:
    """Writes ``settings.yaml``; only rank 0 calls it."""
    settings = to_dict(comparison.base)
    del settings["seed"], settings["run_dir"], settings["algorithm"]["name"]
    text = OmegaConf.to_yaml(OmegaConf.create(settings))
    with options.written(comparison.out):
        comparison.out.mkdir(parents=True, exist_ok=True)
        atomic_files.replace_text(comparison.out / "settings.yaml", text)


def _refuse_tool_settings(job: Sequence[str]) -> None:
    for word in job:
        name, _, value = word.lstrip("+~").partition("=")
        if name in _SET_BY_TOOL or name == "algorithm.name":
            instead = _SET_BY_TOOL[name.partition(".")[0]]
            raise ConfigError(f"{name}={value}: this tool sets it itself; say {instead} instead")


def _seeds(word: str) -> list[int]:
    seeds = options.values(word, "[0,1,2]")
    if not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds):
        text, allowed = word.partition("=")[2], "a list of whole numbers from 0 to 2^32 - 1"
        raise ConfigError(format_option_error("seeds", text, allowed, "try seeds=[0,1,2]"))
    return seeds


def _methods(word: str) -> list[str]:
    methods = options.values(word, _EXAMPLE)
    if not all(isinstance(method, str) for method in methods):
        allowed = "a list of algorithms; options of an algorithm follow its name"
        remedy = f"for example methods={_EXAMPLE}"
        raise ConfigError(format_option_error("methods", word.partition("=")[2], allowed, remedy))
    return methods


def _composed(methods: Sequence[str], job: Sequence[str]) -> Iterator[Config]:
    """Yields a config for each method: the name of an algorithm, then options if it has any."""
    for method in methods:
        name, *more = method.split() or [""]
        _refuse_tool_settings(more)
        yield options.composed([*job, f"algorithm={name}", *more])


def _run_name(label_and_seed: str) -> str:
    label, _, seed = label_and_seed.rpartition(" seed ")
    name = re.sub(r"[^A-Za-z0-9._=-]+", "_", label.replace(", ", "-"))
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return f"{name}-seed{seed}"


def _check_settings(comparison: Comparison) -> None:
    """Raises ``ConfigError`` if the folder has finished runs with other shared options."""
    path = comparison.out / "settings.yaml"
    if not os.path.exists(path) or not list(comparison.out.glob("runs/*/summary.json")):
        return
    try:
        saved = _shared(reports.read_options(path))
    except reports.READ_ERRORS as error:
        allowed = "a new folder, or one with a whole settings.yaml"
        remedy = f"choose another ({error})"
        message = format_option_error("out", comparison.out, allowed, remedy)
        raise ConfigError(message) from error
    settings = comparison.settings
    names = saved.keys() | settings.keys()
    if differing := sorted(name for name in names if saved.get(name) != settings.get(name)):
        allowed = "a new folder, or that of the same options"
        remedy = f"it holds a comparison with another {', '.join(differing)}: choose another"
        raise ConfigError(format_option_error("out", comparison.out, allowed, remedy))
