"""Every file of a run, damaged in every way: one line that names it, or the right result.

Never another exception, never a hang.  It found: readers that waited at a FIFO for ever, bytes that
are not UTF-8 in rounds.jsonl, ``"round": [3]``, a config.yaml that is no mapping, an alias bomb, a
folder as the newest checkpoint, checkpoints without rng or config, and ``round: 17`` inside of
round-000015.pt, which gave another final model without a word.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fedtan_hpc
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import CheckpointConfig, Config, ProbeConfig
from fedtan_hpc.evaluation import probe_records
from fedtan_hpc.job import checkpoint_format, resume, run_dir
from fedtan_hpc.reporting import reports, run_list
from tests.helpers.jobs import config_of, run, run_until

pytestmark = pytest.mark.slow
SECONDS = 5
"""Each reader may take; the alias bomb of old took 25."""
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
Harm = Callable[[Path], object]


def cut(path: Path) -> None:
    """At a half; a file of options inside a name, or it would be one of an older version."""
    half = path.read_bytes()[: path.stat().st_size // 2]
    end = half.rfind(b":") if path.suffix == ".yaml" else len(half)
    path.write_bytes(half[:end])


def flipped(path: Path, seed: int) -> None:
    draw = random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 3, 30])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def text(content: str | bytes) -> Harm:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


HARMS: dict[str, Harm] = {
    "cut": cut,
    "empty": text(""),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()),
    "null characters": text("\0" * 999),
    "a list": text("[1, 2]"),
    "a number": text("3"),
    "a text": text('"x"'),
    "deep": text("[" * 200_000),
    "wide": text("{" * 200_000),
    "alias bomb": text(BOMB),
    "not finite": text('{"round": NaN, "rounds": 1e999, "message": Infinity}'),
    "many digits": text('{"round": ' + "9" * 6000 + "}"),
    "huge": lambda path: os.truncate(path, 2**43),
    "fifo": partial(replaced, make=os.mkfifo),
    "folder": partial(replaced, make=Path.mkdir),
    "link to itself": partial(replaced, make=lambda path: path.symlink_to(path.name)),
    "link to nothing": partial(replaced, make=lambda path: path.symlink_to("nothing")),
    "link to a device": partial(replaced, make=lambda path: path.symlink_to("/dev/zero")),
    **{f"flipped {seed}": partial(flipped, seed=seed) for seed in range(3)},
}


@contextmanager
def limited() -> Iterator[None]:
    """Raises ``TimeoutError`` after ``SECONDS``, also out of a call that waits."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def config_in(folder: Path) -> Config:
    more = {"checkpoint": CheckpointConfig(every=1, keep=9), "probe": ProbeConfig(every=1)}
    return config_of("fedbn", folder, rounds=3, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "finished"
    run(config_in(folder))
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With checkpoints after rounds 1 and 2 of 3."""
    folder = tmp_path_factory.mktemp("files") / "stopped"
    run_until(config_in(folder), 2)
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Makes copies of a folder, one at a time, in the same place."""

    def copied(folder: Path) -> Path:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return Path(shutil.copytree(folder, tmp_path / "run"))

    return copied


def outcome(read: Callable[[], Any], path: Path) -> Any:
    """What ``read`` returns; None if it ends in one line that names the file, or its folder."""
    try:
        with limited():
            return read()
    except (ConfigError, FileNotFoundError) as error:
        [line] = str(error).splitlines()
        assert path.name in line or str(path.parent) in line, line
        assert line.isprintable()
        return None


def goes_on(folder: Path) -> dict[int, str]:
    """The digest of the checkpoint that a run would go on from, by its round."""
    found = resume.load_checkpoint(folder, config_in(folder))
    assert [each.round for each in found.history] == list(range(1, len(found.history) + 1))
    if not found.history:
        return {0: ""}
    assert len(found.history) == found.content["round"]
    return {found.content["round"]: checkpoint_format._digest(found.content)}


STOPPED_FILES = [
    "config.yaml",
    "rounds.jsonl",
    "probe.jsonl",
    "failure.json",
    "best.pt",
    ".lock",
    "checkpoints/round-000002.pt",
    "checkpoints/round-000002.states-0-0.pt",
]


@pytest.mark.parametrize("name", STOPPED_FILES)
def test_a_run_goes_on_from_a_whole_checkpoint_or_says_why_not(
    name: str, stopped: Path, copy_of: Callable[[Path], Path]
) -> None:
    right = {0: "", **goes_on(copy_of(stopped)), **goes_on(first_alone(copy_of(stopped)))}
    for harm in HARMS.values():
        folder = copy_of(stopped)
        path = folder / name
        path.touch()
        if harm_fits(harm, path):
            harm(path)
        found = outcome(partial(claim_and_go_on, folder), path)
        assert found is None or found.items() <= right.items()


def harm_fits(harm: Harm, path: Path) -> bool:
    """An empty file has no bits to flip."""
    return path.stat().st_size > 0 or getattr(harm, "func", None) is not flipped


def first_alone(folder: Path) -> Path:
    checkpoint_format.path_of(folder, 2).unlink()
    return folder


def claim_and_go_on(folder: Path) -> dict[int, str]:
    with run_dir.claimed(folder, config_in(folder)) as summary:
        assert summary is None
        return goes_on(folder)


READERS = {
    "config.yaml": ["claimed", "read_whole", "load_model"],
    "rounds.jsonl": ["read_whole"],
    "probe.jsonl": ["probes"],
    "summary.json": ["claimed", "load_model"],
    "model.pt": ["load_model"],
    "clients.pt": ["client"],
    ".lock": ["claimed"],
}
"""Who reads a file of a finished run, beside the list of runs."""


@pytest.mark.parametrize("name", READERS)
def test_a_finished_run_is_read_or_named(
    name: str,
    finished: Path,
    copy_of: Callable[[Path], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = {key: read() for key, read in readers(copy_of(finished)).items()}
    capsys.readouterr()
    for kind, harm in HARMS.items():
        folder = copy_of(finished)
        path = folder / name
        if harm_fits(harm, path):
            harm(path)
        if (row := readers(folder)["row_of"]()) != whole["row_of"]:
            assert path.name in row.why or kind.startswith("flipped"), (kind, row)
        for key in READERS[name]:
            found = outcome(readers(folder)[key], path)
            is_named = found is None or (found == [] and str(folder) in capsys.readouterr().err)
            if key == "probes" and found is not None:  # not every round has a line
                is_named = found == whole[key][: len(found)]
            # A bit may turn a figure or an option into another that is as good.
            assert is_named or kind.startswith("flipped") or same(found, whole[key]), (kind, key)


def readers(folder: Path) -> dict[str, Callable[[], Any]]:
    def claimed() -> Any:
        with run_dir.claimed(folder, config_in(folder)) as summary:
            return summary

    return {
        "claimed": claimed,
        "row_of": lambda: run_list.row_of(folder, None),
        "probes": lambda: list(probe_records.read(folder)),
        "read_whole": lambda: list(reports.read_whole([folder])),
        "load_model": lambda: fedtan_hpc.load_model(folder).state_dict(),
        "client": lambda: fedtan_hpc.load_model(folder, client=0).state_dict(),
    }


def same(a: Any, b: Any) -> bool:
    """Also of runs that were read from one folder."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return bool(a == b)


WILD: list[Any] = [None, [3], {}, {"a": [1]}, "text", True, -1, 2.5, 10**30, math.nan, [[[]]]]


@pytest.mark.parametrize("name", ["summary.json", "rounds.jsonl"])
def test_each_field_has_its_type_or_is_named(
    name: str, finished: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(finished)
    path = folder / name
    first, _, rest = path.read_text().partition("\n") if name == "rounds.jsonl" else ("", "", "")
    values = json.loads(first or path.read_text())
    draw = random.Random(0)
    named = tried = 0
    for field in [*values, *(f"data.{each}" for each in values.get("data", {}))]:
        for wild in draw.sample(WILD, 6):
            group, _, key = field.rpartition(".")
            changed = json.loads(json.dumps(values))
            (changed[group] if group else changed)[key] = wild
            path.write_text(f"{json.dumps(changed)}\n{rest}")
            row = run_list.row_of(folder, None)
            is_named, tried = path.name in row.why, tried + 1
            named += is_named
            assert is_named or wild is not math.nan, (field, wild)
            if tried % 20 == 0:
                for read in readers(folder).values():
                    outcome(read, path)
    assert named > 0.7 * tried


def unowned(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Contents that no run writes, with digests that are right: as a stranger could make them."""
    draw = random.Random(0)
    for name in content:
        yield f"no {name}", {key: value for key, value in content.items() if key != name}
        for wild in draw.sample([*WILD, torch.ones(3), 10**9, 17, 0], 15 if name == "round" else 5):
            if (name, str(wild)) not in {("seconds", str(each)) for each in (17, 0, 2.5, 10**9)}:
                yield f"{name}={wild!r}", {**content, name: wild}
    [name] = content["shards"][0]
    digest = content["shards"][0][name]
    for other in (f"../checkpoints/{name}", f"/{name}", "round-000001.states-0-0.pt", "", "x.pt"):
        yield f"shards={other}", {**content, "shards": [{other: digest}]}
    lists: list[Any] = [[], [{}], [{name: "x"}], [{name: digest}] * 2, [{name: digest}] * 9]
    for shards in lists:
        yield f"shards={shards}", {**content, "shards": shards}
    for owners in ({}, {0: 1}, {0: -1}, {-1: 0}, {99: 0}, {"0": 0}, {0: "0"}):
        yield f"owners={owners}", {**content, "owners": owners}
    for resumed in ([0], [3], [-1], [True], ["1"], [10**9]):
        yield f"resumed_after={resumed}", {**content, "resumed_after": resumed}
    for options in ({"rounds": "many"}, {"clients": [1]}, {"model": 3}, {"algorithm": {"name": 1}}):
        yield f"config {options}", {**content, "config": {**content["config"], **options}}
    for rng in ([torch.zeros(5, dtype=torch.uint8)], [torch.ones(5056)], [1], content["rng"] * 2):
        yield "rng", {**content, "rng": rng}
    yield "a tensor that repeats its values", {**content, "x": torch.ones(1).expand(10**12)}
    nested: list[Any] = []
    for _ in range(60):
        nested = [nested, nested]
    yield "a list that doubles sixty times", {**content, "x": nested}


HARMLESS = {"resumed_after=[]", "optimizer={}"}
OTHER_RUNS = {"config={}", "config={'a': [1]}"}
"""Their options are the defaults, so the checkpoint is of another run."""


def test_a_checkpoint_means_what_a_run_writes(
    stopped: Path, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the one before is used."""
    content = checkpoint_format.read(checkpoint_format.path_of(stopped, 2))
    digest_of, number = checkpoint_format._digest, 0
    for kind, wrong in unowned(content):
        folder = copy_of(stopped)
        path = checkpoint_format.path_of(folder, 2)
        with monkeypatch.context() as patch:
            if kind.startswith("a "):  # the digest of such contents has no end
                patch.setattr(checkpoint_format, "_digest", lambda content: digest_of({}))
            checkpoint_format.write(path, wrong)
        read = partial(resume.load_checkpoint, folder, config_in(folder))
        found = outcome(read, path)
        assert found is not None or kind in OTHER_RUNS, kind
        assert found is None or found.content["round"] == (2 if kind in HARMLESS else 1), kind
        number += 1
    assert number > 90


def test_a_state_of_another_network_is_named(
    stopped: Path, copy_of: Callable[[Path], Path]
) -> None:
    """Values of another shape would be spread over the network's own."""
    content = checkpoint_format.read(checkpoint_format.path_of(stopped, 2))
    name = next(name for name, value in content["model"].items() if value.dim() == 2)
    for value in (torch.ones(1), torch.ones(2, 3), content["model"][name].double()):
        folder = copy_of(stopped)
        path = checkpoint_format.path_of(folder, 2)
        changed = {**content, "model": {**content["model"], name: value}}
        checkpoint_format.write(path, changed)
        assert outcome(partial(run, config_in(folder)), path) is None
