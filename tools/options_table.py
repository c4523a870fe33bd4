"""Print the README's table of options, made from the fields of ``fedtan_hpc/config/schema.py``.

python tools/options_table.py
"""

from collections.abc import Iterator

from fedtan_hpc.config import help


def rows() -> Iterator[str]:
    """Yields the lines of the table in Markdown."""
    yield "| option | default | allowed | meaning |"
    yield "| --- | --- | --- | --- |"
    for entry in help.entries():
        allowed = entry.allowed.replace("|", "\\|")
        yield f"| `{entry.option}` | `{entry.default}` | {allowed} | {entry.meaning} |"


if __name__ == "__main__":
    print("\n".join(rows()))
