"""The documents are true: links lead somewhere, and files and names in code font exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
FILE = re.compile(r"`((?:fedtan_hpc|tools|tests|slurm|conf|docs)/[\w./]+)`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_of_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if "://" not in link]
    missing = [link for link in links if not (document.parent / link).exists()]
    names = [name for name in FILE.findall(text) if "NAME" not in name]
    missing += [name for name in names if not (ROOT / name).exists()]
    assert not missing


def steps_of_a_batch() -> list[tuple[str, list[str]]]:
    """Files on the way of a batch, and the names in code font that stand behind each."""
    section = ARCHITECTURE.split("\n## The way of one batch\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \d+ \| \[`([\w/.]+)`\]\([^)]*\) \| (.*) \|$", section, flags=re.M)
    return [(file, re.findall(r"`([\w.]+)`", text)) for file, text in rows]


def test_a_batch_is_followed_in_ten_files() -> None:
    """Every step names what is called there, and the file has it."""
    steps = steps_of_a_batch()
    assert 5 < len(steps) <= 10
    for file, names in steps:
        source = (ROOT / "fedtan_hpc" / file).read_text(encoding="utf-8")
        defined = set(re.findall(r"(?:def|class) (\w+)", source))
        assert names, file
        assert {name.rpartition(".")[2] for name in names} <= defined, file


def test_every_room_is_described() -> None:
    rooms = {path.parent.name for path in (ROOT / "fedtan_hpc").glob("*/__init__.py")}
    assert all(f"[`{room}/`]" in ARCHITECTURE for room in rooms)
