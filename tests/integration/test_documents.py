"""The documents are true and short: links, names and commands, and sentences that can be read."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest

import fedtan_hpc
import options_table
from fedtan_hpc.config import help
from fedtan_hpc.config.submit_options import SubmitConfig
from tests.helpers import documents
from tests.helpers.commands import ROOT
from tests.helpers.documents import PAGES, blocks, read

ARCHITECTURE = read(ROOT / "docs" / "architecture.md")
MOST_LINES, MOST_WORDS = 200, 35
"""Of a page, and of a sentence."""
FILE = re.compile(r"(?:fedtan_hpc|tools|tests|slurm|conf|docs|\.ci)/[\w./*-]*")
UNREADABLE = (
    "all clients' batches, differentiated through; then own batch",
    "learnt mix a of those and (1 - a) of the own batch",
    "the callable is given those of",
    "on those only that are stacked together",
    "which is now nothing and now all",
    "but for want of memory, which it would want again",
    "alone one rank to each GPU",
)
"""Parts of sentences that new readers could not understand."""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in documents.links(read(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert target.suffix == ".md", link
            assert anchor in documents.anchors(read(target)), link


@each_page
def test_files_in_code_font_exist(page: Path) -> None:
    words = [word.removeprefix("./") for word in documents.code_words(read(page))]
    for block in blocks(read(page), "sh", "bash"):
        words += [word for line in documents.lines_of(block) for word in line.split()]
    names = [word for word in words if FILE.fullmatch(word) and "NAME" not in word]
    assert not [name for name in names if not list(ROOT.glob(name.rstrip("/")))]


@each_page
def test_options_in_code_font_exist(page: Path) -> None:
    """Those with a group; a name without one may be anything."""
    groups = "|".join(group.name for group in help.groups(SubmitConfig))
    words = " ".join(documents.code_words(read(page)))
    named = re.findall(rf"(?<!\S)((?:{groups})\.[a-z_0-9]+)(?:=\S*)?(?!\S)", words)
    named = [
        name
        for name in named
        if not name.endswith((".pt", ".png", ".py", ".json", ".jsonl", ".md"))
    ]
    assert not sorted(set(named) - {entry.option for entry in help.entries(SubmitConfig)})


@each_page
def test_names_of_the_package_in_code_font_exist(page: Path) -> None:
    text = " ".join(documents.code_words(read(page)))
    for name in re.findall(r"\bfedtan_hpc\.(\w+)", text):
        files = [ROOT / "fedtan_hpc" / each for each in (name, f"{name}.py")]
        assert hasattr(fedtan_hpc, name) or any(file.exists() for file in files), name


@each_page
def test_a_page_is_short_and_says_what_it_is_for(page: Path) -> None:
    text = read(page)
    most = 300 if page.stem == "options" else MOST_LINES  # a table to look things up in
    assert text.count("\n") <= most
    title, opening = text.split("\n\n")[:2]
    assert re.fullmatch(r"# .+", title)
    [purpose] = documents.paragraphs(opening)
    assert len(documents.sentences(purpose)) <= 3


@each_page
def test_sentences_are_short(page: Path) -> None:
    found = [
        f"{documents.length(sentence)} words: {sentence}"
        for paragraph in documents.paragraphs(read(page))
        for sentence in documents.sentences(paragraph)
        if documents.length(sentence) > MOST_WORDS
    ]
    assert not found


@each_page
def test_nothing_waits_to_be_filled_in_or_cannot_be_understood(page: Path) -> None:
    text = " ".join(read(page).replace("`", "").split())
    assert not [words for words in ("@@", "TODO", "TBD", *UNREADABLE) if words in text]
    assert not re.findall(r"^[A-Z]+_[A-Z_]+$|\| [A-Z]{5,} \|", read(page), re.MULTILINE)


@each_page
def test_programs_and_fragments_of_python_are_python(page: Path) -> None:
    for block in blocks(read(page), "python"):
        ast.parse(textwrap.dedent(block.text))


def test_sentences_are_told_apart() -> None:
    """What the test above counts: words, without code and targets, across lines."""
    text = textwrap.dedent("""\
        # Title, which is no sentence

        Data are i.i.d. or not, see [the paper](https://a.b/c "x"). `a b. c` is
        **code.** Why? Fig 1.

        - An item: `x=1`,
          over two lines. torchrun follows.
        1. Another.

        | a table. | B |

        ```sh
        no. Sentence
        ```
        ![A picture. Of it](a.png)
        """)
    found = [documents.sentences(each) for each in documents.paragraphs(text)]
    assert found == [
        ["Data are i.i.d. or not, see the paper.", "code is code.", "Why?", "Fig 1."],
        ["An item: code, over two lines.", "torchrun follows."],
        ["Another."],
    ]
    assert documents.length("One - two, (3).") == 3


def test_anchors_are_githubs() -> None:
    text = "# A `b.c`: [D](e.md), f_g?\n## x\n```sh\n# y\n```\n### X\n"
    assert documents.anchors(text) == {"a-bc-d-f_g", "x", "x-1"}


def test_quick_start_is_two_commands_of_one_line() -> None:
    section = read(ROOT / "README.md").split("\n## Quick start\n")[1].split("\n## ")[0]
    found = [block.text for block in blocks(section, "sh")]
    assert len(found) == 2
    assert all(block.count("\n") == 1 for block in found)
    assert "torchrun --nproc-per-node 5 -m fedtan_hpc" in found[0]
    assert "'.[test]'" in found[1]
    assert "pytest" in found[1]


def test_options_page_is_made_from_the_classes() -> None:
    assert "\n".join(options_table.page()) + "\n" == read(ROOT / "docs" / "options.md")


def test_version_is_that_of_the_change_log() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in text
    log = read(ROOT / "docs" / "CHANGELOG.md")
    versions = re.findall(r"^## (\S+)", log, flags=re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert versions[1] == fedtan_hpc.__version__


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
