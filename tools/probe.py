"""Probes a saved model: how far mismatched BN statistics turn its gradients away.

    python tools/probe.py run_dir=runs/first
    torchrun --nproc-per-node 2 tools/probe.py run_dir=runs/first batches=50 out=probed

run_dir=FOLDER  a finished run; its options, its model.pt and its clients' data are used
batches=N       how many times the clients draw a batch (default 10): the first batches of so many
                rounds, numbered after the last round of the run
out=DIR         folder to write to (default probe in the folder of the run): probe.jsonl, probe.png,
                probe_deviation.png and probe_cosine.png
best=true       the model of the best round, if the run has kept best.pt
trust=true      also a folder of another user, or that every user can write

All other words are options of device, threads and comm; all else is the run's.  No step is taken,
and the files of the run stay as they are.  Prints JSON, with means over the batches, and tables on
standard error.  docs/probe.md says what the figures mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import benchmark
from fedtan_hpc.config import path_options
from fedtan_hpc.config.errors import ConfigError, format_option_error
from fedtan_hpc.evaluation import probe_records
from fedtan_hpc.files import atomic_files
from fedtan_hpc.reporting import options, probe_plots, probe_series
from fedtan_hpc.reporting.probe_series import ProbeSeries
from fedtan_hpc.runtime import launcher_env

if TYPE_CHECKING:
    from fedtan_hpc.config.schema import Config
    from fedtan_hpc.inference.saved_run import SavedRun

OPTIONS = ("run_dir", "batches", "out", "best", "trust")
_CHANGEABLE = ("device", "threads", "comm")
"""Options and groups that may differ from the run's."""
_MOST_BATCHES = 10_000


@dataclass(frozen=True)
class Request:
    """The command line."""

    folder: Path
    out: Path
    batches: int
    best: bool
    trust: bool
    changed: Mapping[str, Any]
    """Options by name that differ from the run's."""

    @classmethod
    def of(cls, words: Sequence[str]) -> Request:
        """Reads the words; raises ``ConfigError`` for a mistake."""
        own, job = options.split(words, OPTIONS)
        values = {name: word.partition("=")[2] for name, word in own.items()}
        for word in job:
            if word.partition("=")[0].partition(".")[0] not in _CHANGEABLE:
                known = ", ".join([*OPTIONS, *_CHANGEABLE])
                raise ConfigError(f"{word}: not understood; the options here are {known}")
        if not values.get("run_dir", "").strip():
            allowed = "the folder of a finished run"
            raise ConfigError(format_option_error("run_dir", "null", allowed, "name it"))
        folder = path_options.expanded(values["run_dir"])
        out = Path(options.folder(own["out"])) if "out" in own else folder / "probe"
        given = options.composed(job)
        names = dict.fromkeys(word.partition("=")[0].partition(".")[0] for word in job)
        return cls(
            folder,
            out,
            _batches(values.get("batches", "10")),
            _is_true("best", values.get("best", "false")),
            _is_true("trust", values.get("trust", "false")),
            {name: getattr(given, name) for name in names},
        )


def run(words: Sequence[str]) -> None:
    """Probes on all ranks; rank 0 writes and prints."""
    request, is_first = Request.of(words), launcher_env.rank_hint() == 0
    options.check_plotting()
    saved, config = _opened(request)
    from fedtan_hpc.inference import probe

    if is_first:
        _make_folder(request.out, config)
    found = []
    for record in probe.records(saved, config, request.batches, request.best):
        found.append(record)
        benchmark.show_progress(len(found), request.batches)
    series = probe_series.of_records(found)
    if is_first and series is not None:
        with options.written(request.out):
            text = "".join(map(probe_records.line_of, found))
            atomic_files.replace_text(request.out / probe_records.NAME, text)
            probe_plots.draw({_title(config, request): series}, request.out)
        _print(series, _setting(request, saved, config))


def _opened(request: Request) -> tuple[SavedRun, Config]:
    """Reads the run, and returns it with the options by which it is probed."""
    from fedtan_hpc.inference import probe, saved_run  # load torch

    try:
        saved = saved_run.open_run(request.folder, request.trust)
        if request.best:
            saved_run.saved_state(saved, best=True)
        return saved, probe.options(saved, request.out, request.changed)
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        allowed, remedy = "the folder of a finished run", f"choose another ({error})"
        message = format_option_error("run_dir", request.folder, allowed, remedy)
        raise ConfigError(message) from error


def _make_folder(out: Path, config: Config) -> None:
    """Makes the folder; raises ``ConfigError`` if it is a run's, or cannot be written."""
    from fedtan_hpc.job import run_dir

    if (out / "config.yaml").exists():
        allowed = "a folder that is not a run's, which may have a probe.jsonl of its own"
        raise ConfigError(format_option_error("out", out, allowed, f"try out={out / 'probe'}"))
    with options.written(out):
        run_dir.make(out, config)
    options.check_writable(out / probe_records.NAME)


def _print(series: ProbeSeries, setting: Mapping[str, Any]) -> None:
    mean = probe_series.mean_of_known
    causes = [
        {
            "cause": cause,
            **{kind: mean(series.totals[f"{kind} {cause}"]) for kind in probe_series.KINDS},
        }
        for cause in probe_series.CAUSES
        if f"deviation {cause}" in series.totals
    ]
    layers = [
        {
            "layer": layer,
            **{each: mean(series.values[each][n]) for each in probe_records.DISTANCES},
        }
        for n, layer in enumerate(series.layers)
    ]
    for rows in (causes, layers):
        if rows:
            shown = [{name: _text(value) for name, value in row.items()} for row in rows]
            benchmark.print_table(shown, {name: f"{{{name}}}" for name in rows[0]})
    benchmark.print_json(setting, causes, layers=layers)


def _title(config: Config, request: Request) -> str:
    return f"{config.algorithm.name}, {request.folder.resolve().name}"


def _setting(request: Request, saved: SavedRun, config: Config) -> dict[str, Any]:
    return benchmark.setting(
        config,
        run_dir=str(request.folder),
        out=str(request.out),
        model="best.pt" if request.best else "model.pt",
        algorithm=str(config.algorithm.name),
        rounds=saved.summary["rounds"],
        batches=request.batches,
    )


def _batches(text: str) -> int:
    if not options.is_count(text, _MOST_BATCHES):
        allowed = f"a whole number from 1 to {_MOST_BATCHES}"
        raise ConfigError(format_option_error("batches", text, allowed, "for example batches=10"))
    return int(text)


def _is_true(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ConfigError(format_option_error(name, text, "true or false", "leave it out"))
    return text == "true"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


if __name__ == "__main__":
    benchmark.main("probe", __doc__, run)
