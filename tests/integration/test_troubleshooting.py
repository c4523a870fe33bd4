"""docs/troubleshooting.md is true: the code has the messages that it quotes, and it has all."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
PYTHON = sorted((ROOT / "fedtan_hpc").rglob("*.py"))
SOURCE = "\0".join(path.read_text(encoding="utf-8") for path in PYTHON)
HEADER = "| message | cause | remedy |"
ROW = re.compile(r"\| `([^`]+)` \| [^|]+ \| [^|]+ \|")
ERRORS = {"RunError", "LostRankError", "Stopped", "RuntimeError"}
"""Errors that end a run or a training loop; those in options say the remedy themselves."""


def rows() -> Iterator[str]:
    """The rows of the tables of messages."""
    for table in PAGE.split(HEADER)[1:]:
        _, _, *lines = table.split("\n\n")[0].split("\n")
        yield from filter(None, lines)


def quoted(row: str) -> str:
    match = ROW.fullmatch(row)
    assert match, f"not a message, a cause and a remedy: {row}"
    return match[1]


MESSAGES = [quoted(row) for row in rows()]


def test_every_table_is_read() -> None:
    assert PAGE.count("| --- | --- | --- |") == PAGE.count(HEADER)
    assert len(MESSAGES) > 50
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_has_the_message(message: str) -> None:
    assert len(message) > 6, "so short a text is everywhere"
    assert message in SOURCE


def text_of(node: ast.expr) -> str:
    """The fixed words of a message, with ... for those that vary."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "..."


def made(path: Path) -> Iterator[str]:
    """The messages of the errors that a file makes, at the call or in a variable of its name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    values: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values.setdefault(node.targets[0].id, []).append(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ERRORS:
            message = node.args[0]
            known = values.get(message.id, []) if isinstance(message, ast.Name) else [message]
            yield from (text for text in map(text_of, known) if text.strip(". :;"))


def test_the_page_has_the_messages_of_errors() -> None:
    found = [text for path in PYTHON for text in made(path)]
    assert len(found) > 16
    assert not [text for text in found if not any(each in text for each in MESSAGES)]
