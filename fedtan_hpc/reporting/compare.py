"""Compare methods: run what is missing, then write a table, a picture and all figures.

    python tools/compare.py experiment=fashion_shards seeds=[0,1,2]
    torchrun --nproc-per-node 2 tools/compare.py experiment=quick methods=[fedtan,fedavg,fedbn]
    python tools/compare.py methods='[fedtan,"fedtan algorithm.synchronised_steps=5"]' rounds=50

methods=[...]  algorithms, each with options of its own after it if it has any, in quotes
               (default [fedtan,fedavg,centralised])
seeds=[...]    seeds of each method (default [0,1,2])
out=DIR        folder of the comparison (default comparisons/ and the name of the experiment)

All other words are options of the job, as for fedtan_hpc, and hold for every run.  Finished runs
are not run again: the same command goes on where it was interrupted, and draws anew once all is
there.  Several commands may fill the same folder at the same time with different methods and
seeds; each then reports all that is finished: DIR/compare.md, compare.png and compare.csv.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import cli
from ..config.errors import ConfigError, RunError
from ..config.schema import Config
from ..runtime import launcher_env
from . import comparison_plots, comparison_runs, comparison_tables, options, reports
from .comparison_runs import Comparison
from .progress import Following, Progress

_HELD = "that no other run is writing"
"""What ``run_folder`` says of a folder that another process holds."""


def main(words: Sequence[str] | None = None) -> None:
    """Do what the command line says; exit codes as those of the job."""
    words = sys.argv[1:] if words is None else list(words)
    first = launcher_env.rank_hint() == 0
    with cli.exit_codes("compare"):
        if not words or {"--help", "-h"} & set(words):
            print(__doc__.strip() if first else "", end="\n" if first else "")
            return
        asked = comparison_runs.plan(words)
        launcher_env.detect()
        _check(asked, first)
        failed = run_all(asked, first)
        if first:
            write(asked, f"python tools/compare.py {shlex.join(words)}")
        if failed:
            raise RunError(f"{failed} of {len(asked.configs)} runs failed", on_all_ranks=True)


def run_all(asked: Comparison, first: bool) -> int:
    """Run what is not finished; how many failed.  All ranks run, the ``first`` shows."""
    ahead = [config for config in asked.configs if not _finished(config)]
    progress = Progress(len(asked.configs), sum(config.rounds for config in ahead), first)
    failed = 0
    with progress.shown():
        for config in asked.configs:
            name = f"{comparison_runs.name_of(config, asked.settings)} seed {config.seed}"
            following = progress.follow(name, config.rounds, config in ahead)
            try:
                progress.end(following, _run(config, following))
            except RunError as error:
                if not error.on_all_ranks:
                    raise
                progress.end(following, f"failed: {error}")
                failed += 1
    return failed


def write(asked: Comparison, command: str) -> None:
    """The files of all that is finished."""
    lines = comparison_runs.lines(asked)
    if not lines:
        print("no run is finished, so there is nothing to compare")
        return
    comparison_tables.write_csv(lines, asked.out / "compare.csv")
    table = comparison_tables.table(lines)
    comparison_tables.write_markdown(table, lines, asked, command)
    comparison_plots.draw(lines, comparison_tables.title(asked.settings), asked.out)
    print("\n".join(["", *table, "", f"files: {asked.out}/compare.md, compare.png, compare.csv"]))


def _check(asked: Comparison, first: bool) -> None:
    """All that can be wrong with any of the runs, before the first of them."""
    options.check_plotting()
    from ..job.run import check_all  # torch loads here

    check_all([config for config in asked.configs if not _finished(config)])
    if first:
        comparison_runs.keep_settings(asked)


def _run(config: Config, log: Following) -> str:
    """Run or find finished; what came of it in words.  Every rank does the same."""
    from ..distributed import process_group
    from ..job.run import run  # torch loads here

    grouped = process_group.is_started()
    try:
        summary = run(config, log)
    except (ConfigError, RunError) as error:
        if isinstance(error, RunError) and not error.on_all_ranks:
            raise
        if process_group.is_started() and not grouped:
            process_group.stop()  # so that the next run starts anew
        if isinstance(error, RunError) or _HELD not in str(error):
            raise
        return "another process is at it, left to that"
    how = f"{summary.total_seconds:.1f} s" if log.told else "was finished"
    return f"test accuracy {100 * summary.test_accuracy:.2f} %, {how}"


def _finished(config: Config) -> bool:
    return reports.finished(Path(str(config.run_dir)))


if __name__ == "__main__":
    main()
