"""requirements.lock: a version, with hashes, of all that pyproject.toml asks for, in its ranges."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
ENTRY = re.compile(r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M)
LOCKED = {canonicalize_name(name): version for name, version, _ in ENTRY.findall(LOCK)}


def test_every_line_is_read() -> None:
    assert len(LOCKED) > 50
    assert ENTRY.sub("", LOCK).count("\n") == LOCK.count("\n#") + 1  # the comment at the top


def test_versions_are_within_the_ranges() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in project["dependencies"] + project["optional-dependencies"]["test"]:
        wanted = Requirement(line)
        version = LOCKED[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version), f"{line}: {version}"
