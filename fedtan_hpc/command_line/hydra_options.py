"""Hydra's own options: two of them have a use here, and the others are refused.

Hydra only composes: a folder, a launcher or a sweeper of its own would have no effect.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from ..config.errors import ConfigError, format_option_error

_ALLOWED = ("hydra.searchpath", "hydra.sweeper.params")
_RUN_DIR = "use run_dir, the folder of a run"
_SUBMIT = "python -m fedtan_hpc.submit hands every point of a sweep to SLURM"
_SEARCH = "give each option its values, as in -m seed=0,1, or call fedtan_hpc.run in a search"
_REMEDIES = {
    "hydra.run": _RUN_DIR,
    "hydra.sweep": _RUN_DIR,
    "hydra.output_subdir": _RUN_DIR,
    "hydra.job.chdir": _RUN_DIR,
    "hydra/launcher": _SUBMIT,
    "hydra.launcher": _SUBMIT,
    "hydra/sweeper": _SEARCH,
    "hydra.sweeper": _SEARCH,
    "hydra.mode": "use -m",
}
"""By the first part of an option's name."""
_UNCHANGED: dict[str, Any] = {
    "hydra.run.dir": ".",
    "hydra.sweep.dir": ".",
    "hydra.sweep.subdir": ".",
    "hydra.output_subdir": None,
    "hydra.job.chdir": None,
    "hydra.mode": None,
    "hydra.launcher._target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra.sweeper._target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
}
"""What files must leave as it is."""


def check_words(overrides: Iterable[Override]) -> None:
    """Raises ``ConfigError`` with a line for each of hydra's options that has no effect."""
    own = [each for each in overrides if _is_hydras(each)]
    if swept := [each for each in own if each.is_sweep_override()]:
        remedy = "put the value in quotes of its own, as in \"'0,1'\""
        raise ConfigError(*(f"{each.input_line}: not understood; {remedy}" for each in swept))
    if fixed := [each for each in own if _is_allowed(each) and _lacks_plus(each)]:
        remedy = "a sweep of its own begins with +, as in +hydra.sweeper.params.seed"
        raise ConfigError(*(f"{each.input_line}: not understood; {remedy}" for each in fixed))
    if refused := [each for each in own if not _is_allowed(each)]:
        raise ConfigError(*(_line(str(each.input_line)) for each in refused))


def check_composed(config: DictConfig) -> None:
    """Does what ``check_words`` does, for the options of files."""
    options = {name: _as_written(config, name.split(".")) for name in _UNCHANGED}
    changed = [name for name, value in options.items() if value != _UNCHANGED[name]]
    if changed:
        raise ConfigError(*(_line(f"{name}={options[name]}") for name in changed))


def _as_written(config: DictConfig, names: Sequence[str]) -> Any:
    """Returns an option as the file has it: some of hydra's own cannot be resolved here."""
    value = OmegaConf.to_container(config, resolve=False)
    for name in names:
        value = value[name]  # type: ignore[call-overload, index]
    return value


def _is_hydras(override: Override) -> bool:
    return override.is_hydra_override() or override.key_or_group == "hydra"


def _lacks_plus(override: Override) -> bool:
    is_added = override.is_add() or override.is_force_add()
    return override.key_or_group.startswith("hydra.sweeper.params") and not is_added


def _is_allowed(override: Override) -> bool:
    key = override.key_or_group
    return any(key == name or key.startswith(f"{name}.") for name in _ALLOWED)


def _line(word: str) -> str:
    option, _, value = word.partition("=")
    parts = [part for part in _REMEDIES if option.lstrip("+~").startswith(part)]
    remedy = _REMEDIES[max(parts, key=len)] if parts else "leave it out"
    allowed = f"{' and '.join(_ALLOWED)} of hydra's own options"
    return format_option_error(option, value, allowed, remedy)
