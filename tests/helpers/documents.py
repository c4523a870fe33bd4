"""Pages of the documents, as tests read them: blocks, commands, prose, links and anchors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.helpers.commands import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)[^)]*\)")
_CODE = re.compile(r"`([^`\n]+)`")
_ITEM = re.compile(r"\s*(?:[-*+]|\d+\.)\s+")
_ABBREVIATIONS = ("i.i.d.", "e.g.", "i.e.", "al.", "vs.", "cf.", "approx.")
_OPERATOR = re.compile(r"\s(\|\|?|&&?|;|2?>>?|<|2>&1)(?:\s|$)")
_COMMENT = re.compile(r"\s+#\s.*$")


class Block(NamedTuple):
    """A block of code and its language."""

    language: str
    text: str


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[Block]:
    """The blocks of a page in its order; all languages if none is given."""
    found = [Block(*match) for match in _BLOCK.findall(text)]
    return [block for block in found if not languages or block.language in languages]


def lines_of(block: Block) -> Iterator[str]:
    """The commands of a block of shell, those with a backslash at the end joined."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield " ".join(line.split())


def split_at_operator(line: str) -> tuple[str, str, str]:
    """A command, the first operator of the shell behind it, and the rest without comments."""
    found = _OPERATOR.split(_COMMENT.sub("", line), maxsplit=1)
    return (found[0], found[1], found[2]) if len(found) == 3 else (found[0], "", "")


def program(block: Block) -> str | None:
    """The name of a file of Python that the block holds whole, which its first line says."""
    named = re.match(r"# ([\w.]+\.py)\n", block.text)
    return named[1] if named else None


def without_blocks(text: str) -> str:
    return _BLOCK.sub("", text)


def links(text: str) -> list[str]:
    """The targets of links and pictures that are no addresses of the net."""
    targets = [target for _, target in _LINK.findall(without_blocks(text))]
    return [target for target in targets if "://" not in target and not target.startswith("mailto")]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", without_blocks(text), flags=re.MULTILINE):
        plain = _LINK.sub(r"\1", heading).replace("`", "").strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = sum(
            re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None for other in found
        )
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def code_words(text: str) -> list[str]:
    """All words in code font."""
    return [word for code in _CODE.findall(without_blocks(text)) for word in code.split()]


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs and list items; without headings, tables, code and the targets of links."""
    for part in re.split(r"\n\s*\n", without_blocks(text)):
        item: list[str] = []
        for line in part.splitlines():
            begins = _ITEM.match(line)
            if begins or line.startswith(("#", "|", "    ", "<!--")):
                yield from _plain(item)
                item = [line[begins.end() :]] if begins else []
            else:
                item.append(line)
        yield from _plain(item)


def _plain(lines: list[str]) -> Iterator[str]:
    """The words of a paragraph, with one word for each piece of code; nothing for a picture."""
    text = " ".join(" ".join(lines).split())
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = _LINK.sub(r"\1", _CODE.sub("code", text)).replace("**", "").strip()
    if text:
        yield text


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph; one ends with a mark that a space follows."""
    found, begin = [], 0
    for match in re.finditer(r"[.!?][)\"'*_]*\s+", paragraph):
        last = paragraph[begin : match.end()].split()[-1].lstrip("([\"'*_").lower()
        follows = paragraph[match.end() : match.end() + 1]
        if last in _ABBREVIATIONS and not follows.isupper():
            continue
        found.append(paragraph[begin : match.end()].strip())
        begin = match.end()
    return [*found, *([paragraph[begin:].strip()] if paragraph[begin:].strip() else [])]


def length(sentence: str) -> int:
    """The number of words that have a letter or a digit."""
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())
