"""Compares methods: runs what is missing, then writes a table, a picture and all figures.

    python -m fedtan_hpc.compare experiment=fashion_shards seeds=[0,1,2]
    torchrun --nproc-per-node 2 -m fedtan_hpc.compare experiment=quick methods=[fedtan,fedbn]
    python -m fedtan_hpc.compare methods='[fedtan,"fedtan algorithm.synchronised_steps=5"]'

methods=[...]  algorithms; options of an algorithm follow its name, in quotes
               (default [fedtan,fedavg,centralised])
seeds=[...]    seeds of each method (default [0,1,2])
out=DIR        folder of the comparison (default comparisons/ and the name of the experiment)

All other words are options of the job, as for fedtan_hpc; they hold for every run.  Finished runs
are not run again: the same command goes on where it was interrupted, and draws the files again when
all runs are finished.  Several commands may fill one folder at the same time with different methods
and seeds; each reports all finished runs in DIR/compare.md, compare.png and compare.csv.  If runs
have probes (probe.every=R), it also draws DIR/probe.png, probe_deviation.png and probe_cosine.png.
In a checkout ``python tools/compare.py`` does the same as ``python -m fedtan_hpc.compare``.
"""

import shlex
import sys
from collections.abc import Sequence

from .. import cli
from ..config.errors import ConfigError, FolderInUseError, RunError, Stopped
from ..config.schema import Config
from ..evaluation.records import headline
from ..runtime import launcher_env
from . import options, probe_plots
from .comparison import members, plots, tables
from .comparison.members import Comparison
from .progress import Following, Progress


def main(words: Sequence[str] | None = None) -> None:
    """Does what the command line says; the exit codes are those of the job."""
    words = sys.argv[1:] if words is None else list(words)
    is_first = launcher_env.rank_hint() == 0
    with cli.exit_codes("compare"):
        if options.shows_help(words or ["--help"], __doc__):
            return
        comparison = members.plan(words)
        launcher_env.detect()
        _check(comparison, is_first)
        failed = run_all(comparison, is_first)
        if is_first:
            write(comparison, f"python -m fedtan_hpc.compare {shlex.join(words)}")
        if failed:
            message = f"{failed} of {len(comparison.configs)} runs failed"
            raise RunError(message, on_all_ranks=True)


def run_all(comparison: Comparison, is_first: bool) -> int:
    """Runs what is not finished, on all ranks; returns the number of failed runs.

    The rank that ``is_first`` shows the progress.
    """
    unfinished = comparison.unfinished
    rounds = sum(config.rounds for config in unfinished)
    progress = Progress(len(comparison.configs), rounds, is_first)
    failed = 0
    with progress.shown():
        for config in comparison.configs:
            name = comparison.name_of(config)
            following = progress.follow(name, config.rounds, config in unfinished)
            try:
                progress.end(following, _run(config, following))
            except RunError as error:
                if isinstance(error, Stopped) or not error.on_all_ranks:
                    raise
                progress.end(following, f"failed: {error}")
                failed += 1
    return failed


def write(comparison: Comparison, command: str) -> None:
    """Writes the files of the comparison with all finished runs, and prints the table."""
    out = comparison.out
    lines = members.finished_lines(out, comparison.settings)
    if not lines:
        print("no run is finished, so there is nothing to compare")
        return
    tables.write_csv(lines, out / "compare.csv")
    table = tables.table(lines)
    tables.write_markdown(table, lines, comparison, command)
    plots.draw(lines, out)
    probes = tables.probes(lines)
    if probes:
        probe_plots.draw(probes, out)
    names = ["compare.md", "compare.png", "compare.csv", *(probe_plots.FILES if probes else ())]
    print("\n".join(["", *table, "", f"files: {out}/{', '.join(names)}"]))


def _check(comparison: Comparison, is_first: bool) -> None:
    """Finds all mistakes of all runs before the first of them begins."""
    options.check_plotting()
    from ..job.run import check_all  # loads torch

    check_all(comparison.unfinished)
    if is_first:
        members.write_settings(comparison)


def _run(config: Config, following: Following) -> str:
    """Runs a job unless it is finished, on every rank; returns the result in words."""
    from ..distributed import process_group
    from ..job.run import keep_freed_memory, run  # loads torch

    keep_freed_memory(config)
    was_started = process_group.is_started()
    try:
        summary = run(config, callbacks=[following])
    except (ConfigError, RunError) as error:
        if isinstance(error, RunError) and not error.on_all_ranks:
            raise
        if process_group.is_started() and not was_started:
            process_group.stop()  # the next run starts it again
        if not isinstance(error, FolderInUseError):
            raise
        return "skipped: another process is running it"
    how = f"{summary.total_seconds:.1f} s" if following.rounds_ended else "was finished"
    return f"{' '.join(headline(summary))}, {how}"
