"""Evaluates the model of a finished run, on its own test set or on that of other data.

    python -m fedtan_hpc.evaluate run_dir=runs/first
    python -m fedtan_hpc.evaluate run_dir=runs/first data=folder data.root=other_hospital
    python -m fedtan_hpc.evaluate run_dir=runs/personal client=3 out=client3.json

run_dir=FOLDER  the finished run
client=K        the model of client K, which has kept parts of it (default: the global model;
                if all clients have models of their own, the mean over them)
best=true       the model of the best round, if the run has kept best.pt
trust=true      also a folder of another user, or that every user can write
out=FILE        JSON file to write the figures to, beside the printed line

All other words are options of the data (data=, data.root= and so on), device and threads; all else
is the run's.  data=NAME begins with the defaults of that data set.  Inputs are normalised by mean
and deviation of the run's training data.  The folder of the run stays as it is.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import cli
from .config import path_options
from .config.enums import PartitionName
from .config.errors import ConfigError, format_option_error, printable
from .config.schema import Config, PartitionConfig
from .config.validate import check
from .config.validation.bounds import MOST
from .files import atomic_files
from .reporting import options
from .runtime import launcher_env

_OWN = ("run_dir", "client", "best", "trust", "out")
_CHANGEABLE = ("data", "device", "threads")
"""Options and groups that may differ from the run's."""


def main(words: Sequence[str] | None = None) -> None:
    """Evaluates on one process and prints the figures; the exit codes are those of the job."""
    words = sys.argv[1:] if words is None else list(words)
    with cli.exit_codes("evaluate"):
        if launcher_env.rank_hint() != 0 or options.shows_help(words or ["--help"], __doc__):
            return
        own, job = options.split(words, _OWN)
        _check_words(job)
        out = Path(options.folder(own["out"])) if "out" in own else None
        if out is not None:
            options.check_writable(out)
        figures = evaluated({name: word.partition("=")[2] for name, word in own.items()}, job)
        print(printable("  ".join(f"{name} {_text(value)}" for name, value in figures.items())))
        if out is not None:
            with options.written(out):
                atomic_files.replace_text(out, json.dumps(figures, indent=2) + "\n")


def evaluated(own: dict[str, str], job: Sequence[str]) -> dict[str, Any]:
    """Returns the figures by name, of the run that ``own`` names on the data of the words ``job``.

    Raises ``ConfigError`` if run, client or data cannot be used.
    """
    if not own.get("run_dir", "").strip():
        allowed = "the folder of a finished run"
        raise ConfigError(format_option_error("run_dir", "null", allowed, "name it"))
    client = _client(own.get("client", "null"))
    best, trust = (_is_true(name, own.get(name, "false")) for name in ("best", "trust"))
    given = options.composed(job)
    from .inference import evaluate, saved_run  # load torch

    try:
        run = saved_run.open_run(path_options.expanded(own["run_dir"]), trust)
        config = _options(run.config, given, job)
        models = list(evaluate.models_of(run, client, best, trust))
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    return evaluate.evaluate(run, config, models)


def _check_words(job: Sequence[str]) -> None:
    for word in job:
        if word.partition("=")[0].partition(".")[0] not in _CHANGEABLE:
            known = ", ".join([*_OWN, *_CHANGEABLE])
            raise ConfigError(f"{word}: not understood; the options here are {known}")


def _is_true(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ConfigError(format_option_error(name, text, "true or false", "leave it out"))
    return text == "true"


def _client(text: str) -> int | None:
    if text != "null" and not options.is_count(text, MOST, least=0):
        allowed = "the number of a client, from 0, or null"
        raise ConfigError(format_option_error("client", text, allowed, "for example client=0"))
    return None if text == "null" else int(text)


def _options(saved: Config, given: Config, job: Sequence[str]) -> Config:
    """Returns the options of the run, with those of the words ``job`` in their place."""
    chosen = [word.partition("=")[0] for word in job]
    changed: dict[str, Any] = {name: getattr(given, name) for name in chosen if "." not in name}
    single = {name.split(".")[1] for name in chosen if "." in name}
    if single and "data" not in changed:
        values = {name: getattr(given.data, name) for name in single}
        changed["data"] = replace(saved.data, **values)
    config = replace(saved, **changed)
    plain = PartitionConfig(name=PartitionName.iid)
    model = replace(config.model, norm=None)  # not every algorithm allows another
    check(Config(data=config.data, task=config.task, model=model, partition=plain, clients=1))
    return config


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value}"


if __name__ == "__main__":
    main()
