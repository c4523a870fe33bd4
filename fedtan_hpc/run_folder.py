"""The folder of a run: its name, what it holds, and that a finished run is never overwritten.

config.yaml    the options, resolved
rounds.jsonl   a line a round (``metrics.RoundRecord``)
summary.json   the result (``metrics.Summary``); its presence means that the run is finished
model.pt       state_dict of the final global model
events.*       TensorBoard
interrupted-N/ what an unfinished run left in this folder before the present one
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from . import files
from .config import Config, to_dict
from .errors import ConfigError, mistake
from .metrics import Summary


def name(config: Config) -> Path:
    """The folder that ``run_dir`` says, else one named after the other options."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    options = json.dumps(_identity(config), sort_keys=True)
    digest = hashlib.sha256(options.encode()).hexdigest()[:8]
    words = (
        config.algorithm.name,
        config.data.name,
        config.model.name,
        config.partition.name,
        f"{config.clients}clients",
        f"{config.local_steps}steps",
        f"seed{config.seed}",
        digest,
    )
    return Path("runs") / "-".join(words)


def claim(folder: Path, config: Config) -> Summary | None:
    """Make the folder ready for a new run, or return the summary of the same run, finished.

    Raises ``ConfigError`` if it holds a finished run of another configuration or cannot be
    written.
    """
    try:
        if (folder / "summary.json").exists():
            return _finished(folder, config)
        folder.mkdir(parents=True, exist_ok=True)
        _set_aside(folder)
        text = OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
        files.replace_text(folder / "config.yaml", text)
    except OSError as error:
        allowed = "a folder that can be written"
        raise ConfigError(
            mistake("run_dir", folder, allowed, f"choose another ({error.strerror})")
        ) from error
    return None


def finish(folder: Path, summary: Summary) -> None:
    """Write ``summary.json``, the last file of a run."""
    files.replace_text(folder / "summary.json", json.dumps(asdict(summary), indent=2) + "\n")


def _identity(config: Config) -> dict[str, Any]:
    return {key: value for key, value in to_dict(config).items() if key != "run_dir"}


def _finished(folder: Path, config: Config) -> Summary:
    saved: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    differing = sorted(_differences(saved, to_dict(config)) - {"run_dir"})
    if differing:
        raise ConfigError(
            mistake(
                "run_dir",
                folder,
                "a new folder, or that of the same configuration",
                f"it holds a finished run with another {', '.join(differing)}: "
                "choose another run_dir",
            )
        )
    return Summary(**json.loads((folder / "summary.json").read_text(encoding="utf-8")))


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of the options that are not the same in both."""
    found = set()
    for key in a.keys() | b.keys():
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found |= _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.add(prefix + key)
    return found


def _set_aside(folder: Path) -> None:
    """Move what an unfinished run left into ``interrupted-N``."""
    names = ("config.yaml", "rounds.jsonl", "model.pt")
    left = [folder / name for name in names] + list(folder.glob("events.*"))
    left = [path for path in left if path.exists()]
    if not left:
        return
    number = 1 + sum(1 for _ in folder.glob("interrupted-*"))
    aside = folder / f"interrupted-{number}"
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
