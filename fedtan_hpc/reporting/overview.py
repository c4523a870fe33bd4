"""Several comparisons side by side: final accuracies, a row for each method.

    python tools/overview.py comparisons/digits_shards comparisons/fashion_shards

The folders are those of tools/compare.py; each is a column, named after the folder.  In a cell:
mean ± sample deviation over the seeds of the test accuracy after the last round, in percent, and
in brackets, where clients have models of their own, the accuracy in each client's own mix of
labels.  Methods come in the order of the first folder, best first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import comparison_runs
from .reports import Run, mean_and_deviation

_OWN = "clients_own_mix_accuracy_mean"


def main(words: Sequence[str] | None = None) -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of comparisons")
    folders: list[Path] = parser.parse_args(words).folders
    for folder in folders:
        if not (folder / "settings.yaml").exists():
            parser.error(f"{folder} holds no comparison (there is no settings.yaml)")
    print("\n".join(table(folders)))


def table(folders: Sequence[Path]) -> list[str]:
    """A line of heads, and one for each method that any folder has."""
    columns = [comparison_runs.finished_lines(folder) for folder in folders]
    methods = list(dict.fromkeys(method for column in columns for method in column))
    rows = [["method", *(folder.name for folder in folders)], ["---"] * (len(folders) + 1)]
    for method in methods:
        rows.append([method, *(_cell(column.get(method, [])) for column in columns)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(runs: Sequence[Run]) -> str:
    if not runs:
        return ""
    text = mean_and_deviation([100 * run.accuracy for run in runs])
    own = [run.evaluated[-1].get(_OWN) for run in runs]
    mixes = [100 * value for value in own if value is not None]
    return f"{text} ({mean_and_deviation(mixes)})" if mixes else text


if __name__ == "__main__":
    main()
