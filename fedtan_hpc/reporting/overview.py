"""Shows several comparisons side by side: final metrics, one row for each method.

    python -m fedtan_hpc.overview comparisons/digits_shards comparisons/fashion_shards

Each folder of ``compare`` is a column, named after the folder.  A cell has the test metric after
the last round, for classification the accuracy in percent: mean ± sample deviation over the seeds.
In brackets, where clients have models or test samples of their own, follows its mean on each
client's own data.  The order of the methods is that of the first folder, best first.  A checkout
also has ``tools/overview.py``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .. import cli
from .comparison import members
from .reports import Measure, Run, markdown_table, read_options


def main(words: Sequence[str] | None = None) -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders of comparisons")
    folders: list[Path] = parser.parse_args(words).folders
    for folder in folders:
        if not (folder / "settings.yaml").exists():
            parser.error(f"{folder} holds no comparison (there is no settings.yaml)")
    with cli.exit_codes("overview"):
        print("\n".join(table(folders)))


def table(folders: Sequence[Path]) -> list[str]:
    """Returns the lines of the table: one row for each method that any folder has."""
    columns = [
        members.finished_lines(folder, read_options(folder / "settings.yaml")) for folder in folders
    ]
    methods = dict.fromkeys(method for column in columns for method in column)
    rows = ([method, *(_cell(column.get(method, [])) for column in columns)] for method in methods)
    return markdown_table(["method", *(folder.name for folder in folders)], rows)


def _cell(runs: Sequence[Run]) -> str:
    if not runs:
        return ""
    measure = Measure.of({"": runs})
    test, own = (measure.summary(runs, figure) for figure in (measure.test, measure.own))
    return f"{test} ({own})" if own else test
